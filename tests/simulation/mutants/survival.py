"""Mutants of what keeps engines and nodes going: bad input, lost connections, numbers used twice, endless waits."""

from __future__ import annotations

from .mutant import Mutant

SURVIVAL = (
    Mutant(
        "bad-address-taken",
        "scheduler",
        "2.2: an address without a port counts as one, and comes to the sockets",
        "lmkv/addresses.py",
        '        raise ConfigError(f"{_short(address)} is not a control address", hint=hint)',
        "        return str(address), 0",
    ),
    Mutant(
        "cut-off-peer-stays-dead",
        "worker",
        "2.4: a peer whose connection was lost is taken for dead, and stays so when it is there again",
        "lmkv/vllm/writer.py",
        "dead=loss is Loss.DEAD,",
        "dead=loss is not Loss.SILENT,",
        needs="faults",
    ),
    Mutant(
        "transfer-id-used-twice",
        "scheduler",
        "2.5: the transfer id of a request whose blocks are still held is taken for a second request",
        "lmkv/vllm/prefill.py",
        "if owner != request.request_id:",
        'if owner == "":',
    ),
    Mutant(
        "proof-after-parting-lost",
        "worker",
        "2.6: a peer that was only silent when it was parted from is not noticed to be fenced later",
        "lmkv/vllm/peers.py",
        "elif loss is Loss.FENCED and (departed := self._departed.take_fenced(peer, transport_id)) is not None:",
        "elif loss is None:",
        needs="faults",
    ),
    Mutant(
        "op-error-escapes",
        "worker",
        "2.8: what torch raises in an op is not an error of lmkv, which ends one transfer",
        "lmkv/kernels/_guard.py",
        "except (RuntimeError, IndexError, MemoryError) as error:",
        "except (IndexError, MemoryError) as error:",
        needs="faults",
    ),
    Mutant(
        "outbox-never-forgets",
        "scheduler",
        "2.3: connections to peers that nothing is sent to any more stay open",
        "lmkv/control/mailbox.py",
        "if now_s - connection.used_s < self._idle_s:",
        "if now_s - connection.used_s < 1e9:",
    ),
    Mutant(
        "reset-not-in-the-prompt",
        "scheduler",
        "1.6: KV of weights that have been replaced is sent to an engine that has not heard of it",
        "lmkv/vllm/prompt.py",
        '_add(state, "reset", adapters.since_reset)',
        '_add(state, "reset", b"")',
    ),
    Mutant(
        "received-and-sent",
        "pool",
        "a preempted request that ends while it loads is told to vLLM as received, and as sent too",
        "lmkv/vllm/pooled/side.py",
        "pooled.stored = False  #",
        "pooled.stored = True  #",
        needs="pool",
    ),
    Mutant(
        "unconfirmed-connection-used",
        "worker",
        "grants of a pair that decode has lost are served over a connection that was made since",
        "lmkv/vllm/pal.py",
        "confirmed: bool = False",
        "confirmed: bool = True",
        needs="faults",
    ),
    Mutant(
        "nothing-gives-way",
        "scheduler",
        "prefill and decode each hold the blocks that the other waits for",
        "lmkv/vllm/yielding.py",
        "if now_s - self._stuck_s < YIELD_S:",
        "if self._stuck_s >= 0.0:",
    ),
)
