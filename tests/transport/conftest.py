"""The back ends under test, and ends of them. See `endpoints`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import pytest
from endpoints import Endpoint, ProcessEndpoint, ThreadEndpoint

ARENA_BYTES = 136 << 20
SMALL_ARENA_BYTES = 32 << 20


@dataclass(frozen=True)
class BackEnd:
    id: str
    url: str
    module: str
    processes: bool = True
    env: dict[str, str] = field(default_factory=dict, hash=False)


UCX_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
BACK_ENDS = (
    BackEnd("inproc", "inproc://", "lmkv.transport.inproc", processes=False),
    BackEnd("tcp", "tcp://127.0.0.1", "lmkv.transport.tcp"),
    BackEnd("nixl", "nixl://", "lmkv.transport.nixl"),
    BackEnd("nixl-tcp", "nixl://", "lmkv.transport.nixl", env=UCX_TCP),
    BackEnd("nixl-event", "nixl://?progress=event&threads=2", "lmkv.transport.nixl"),
    BackEnd("ucx", "ucx://127.0.0.1", "lmkv.transport.ucx"),
)

_names = count(1)


@cache
def why_absent(module: str) -> str:
    """Empty when `module` can be imported. In a process of its own: nixl and ucxx must never share one."""
    probe = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=60)
    return "" if probe.returncode == 0 else probe.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="session", params=BACK_ENDS, ids=lambda b: b.id)
def back_end(request: pytest.FixtureRequest) -> BackEnd:
    reason = why_absent(request.param.module)
    if reason:
        pytest.skip(f"{request.param.module} cannot be imported: {reason}")
    return request.param


def open_ends(back_end: BackEnd, *roles: str, arena_bytes: int, prefix: tuple[str, ...] = ()) -> list[Endpoint]:
    """Ends with names of their own, started side by side; `prefix` goes before the command of a process."""
    ends: list[Endpoint] = [
        ProcessEndpoint(back_end.env, prefix) if back_end.processes else ThreadEndpoint() for _ in roles
    ]
    for end, role in zip(ends, roles, strict=True):
        end.send("open", url=back_end.url, name=f"{back_end.id}-{role}-{next(_names)}", arena_bytes=arena_bytes)
    for end in ends:
        end.described(end.reply())
    return ends


def connect_both_ways(one: Endpoint, other: Endpoint) -> None:
    one.call("connect", export=other.export)
    other.call("connect", export=one.export)


@pytest.fixture(scope="session")
def shared_pair(back_end: BackEnd) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Writer and target, connected both ways; for tests that leave both alive."""
    writer, target = open_ends(back_end, "writer", "target", arena_bytes=ARENA_BYTES)
    connect_both_ways(writer, target)
    yield writer, target
    for end in (writer, target):
        end.end()


@pytest.fixture
def pair(shared_pair: tuple[Endpoint, Endpoint]) -> Iterator[tuple[Endpoint, Endpoint]]:
    """The shared pair, and afterwards: guards whole, nothing in flight, nobody lost."""
    yield shared_pair
    names = {end.name for end in shared_pair}
    for end in shared_pair:
        assert end.call("guards_intact")
        assert end.call("in_flight") == 0
        assert not [event for event in end.fetch() if event[0] == "lost" and event[1] in names]


@pytest.fixture
def victim(shared_pair: tuple[Endpoint, Endpoint], new_ends: Callable[..., list[Endpoint]]) -> Endpoint:
    """A target connected both ways with the shared writer, to be stopped or killed."""
    (end,) = new_ends("victim")
    connect_both_ways(shared_pair[0], end)
    return end


@pytest.fixture
def new_ends(back_end: BackEnd) -> Iterator[Callable[..., list[Endpoint]]]:
    """Makes ends that a test may kill; all are ended afterwards."""
    made: list[Endpoint] = []

    def make(*roles: str, arena_bytes: int = SMALL_ARENA_BYTES) -> list[Endpoint]:
        ends = open_ends(back_end, *roles, arena_bytes=arena_bytes)
        made.extend(ends)
        return ends

    yield make
    for end in made:
        end.end()
