"""lmkv in one thread and in virtual time: what a seed has shown once, it shows again.

    with SteppedRuntime(seed) as world:
        process = world.process("decode-0", host="a")       # one for each operating system process
        loop = WorkerLoop(..., runtime=process.runtime)     # every part takes a Runtime, last
        loop.start()                                        # opened here and now; turns come from the world
        world.run_until(lambda: ..., timeout_s=5.0)         # False: not within 5 virtual seconds
        world.step()                                        # one turn of one part that is due, drawn by the seed
        process.kill(); process = world.process("decode-0", host="a")    # dies, and comes back under its name

`LmkvConnector.runtime` is a class attribute: make a subclass for each process, with `runtime = process.runtime`. A part
of the test's own, such as an engine, gets turns with `process.start_part(name, part)`; while it waits in a hook
(`Runtime.wait`), all other parts get theirs. Parts that are in a turn already are never entered again.

Time moves by a little with each turn (`world.turn_s`), and jumps to the next deadline or arrival when no part is due.
A part is due when its `next_s` is over, when it was woken, or when a message has come to one of its `descriptors`.

Faults: `world.network.faults` (delays), `world.network.cut(host, host)` and `heal`, `world.network.reset(process,
process)`, `process.kill(silent=...)`, `process.stall(seconds)`, and `process.transports[name].faults` (inproc://: hold,
stall, cut, delay_polls, fail_next, corrupt_next, reorder_notes; see lmkv.transport.inproc).

The data plane is inproc:// (its copies are made in the writer's turns). Jobs of a pool node's tiers are done in turns
of their lanes, within `world.lane_s`; what a disk does inside such a job takes no virtual time. Sets of text change
their order with PYTHONHASHSEED: a run that is to be replayed in another process needs it to be the same.
"""
