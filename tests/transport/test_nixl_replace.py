"""A new NIXL agent: what an old connection had in flight does not land after it. Two processes, UCX over TCP."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import why_absent

if reason := why_absent("lmkv.transport.nixl"):
    pytest.skip(f"nixl cannot be imported: {reason}", allow_module_level=True)

COMMON = """
import sys, time
import numpy as np
from lmkv.transport import open_transport, Region, Extents, Completion, Notification, PeerLost
MIB = 1 << 20
def say(data): print(data.hex() if isinstance(data, bytes) else data, flush=True)
def hear():
    while True:
        line = sys.stdin.readline().strip()
        if not line.startswith("["): return line
def memory(value):
    block = np.full(64 * MIB, value, dtype=np.uint8)
    return block, block.ctypes.data
"""

WRITER = (
    COMMON
    + """
block, address = memory(7)
t = open_transport("nixl://", "writer")
t.register(Region(address, 64 * MIB, owner=block))
say(t.export())
for round in range(2):
    export = bytes.fromhex(hear()); target = int(hear())
    peer = t.connect(export)
    op = t.write(peer, Extents.of((address, 64 * MIB)), Extents.of((target, 64 * MIB)), b"note")
    say("posted")
    end, result = time.monotonic() + 20, "nothing"
    while time.monotonic() < end and result == "nothing":
        for event in t.poll():
            if isinstance(event, Completion):
                result = "error" if event.error else "done"
                t.release(op)
        time.sleep(0.0005)
    for _ in range(20):
        t.poll()
        time.sleep(0.001)
    say(result)
"""
)

TARGET = (
    COMMON
    + """
block, address = memory(0)
t = open_transport("nixl://", "target-1")
t.register(Region(address, 64 * MIB, owner=block))
t.connect(bytes.fromhex(hear()))
say(t.export()); say(address)
hear()  # posted
end = time.monotonic() + 20
while block[:: 4096].max() == 0 and time.monotonic() < end:
    t.poll()  # some of it lands, most of it is in flight
before = int(np.count_nonzero(block))
ops, peers = t.replace("target-2")
at_once = int(np.count_nonzero(block))
time.sleep(1.0)
for _ in range(200):
    assert not [e for e in t.poll() if isinstance(e, Notification)]
    time.sleep(0.001)
say(f"{before} {at_once} {int(np.count_nonzero(block))} {len(ops)} {peers} {t.name}")
hear()  # how the writer's operation ended
t.connect(bytes.fromhex(sys.argv[1]))
say(t.export()); say(address)
hear()  # posted
end, notes = time.monotonic() + 20, []
while not notes and time.monotonic() < end:
    notes = [e.payload for e in t.poll() if isinstance(e, Notification)]
say(f"notes {notes} {int(np.count_nonzero(block == 7))}")
"""
)


def test_nothing_lands_through_the_old_agent_and_the_new_one_works() -> None:
    env = {**os.environ, "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}

    with subprocess.Popen([sys.executable, "-c", WRITER], **start) as writer:  # type: ignore[call-overload]

        def read(process: subprocess.Popen[str]) -> str:
            assert process.stdout is not None
            while (line := process.stdout.readline()).startswith("["):  # UCX's own log
                pass
            assert line, "the process has ended"
            return line.strip()

        def tell(process: subprocess.Popen[str], line: str) -> None:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()

        export = read(writer)
        with subprocess.Popen([sys.executable, "-c", TARGET, export], **start) as target:  # type: ignore[call-overload]
            try:
                tell(target, export)
                tell(writer, read(target))
                tell(writer, read(target))
                tell(target, read(writer))
                before, at_once, later, ops, peers, name = read(target).split()
                assert 0 < int(before) < 64 << 20, "the write was under way"
                assert at_once == later, "nothing landed after the old agent was gone"
                assert (ops, peers, name) == ("0", "['writer']", "target-2")
                ended = read(writer)
                assert ended == "error", "the writer learns that its connection has ended"
                tell(target, ended)
                tell(writer, read(target))
                tell(writer, read(target))
                tell(target, read(writer))
                assert read(target) == f"notes [b'note'] {64 << 20}", "the same memory, through the new agent"
            finally:
                target.kill()
                writer.kill()
