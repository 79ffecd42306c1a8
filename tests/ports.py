"""Ports for servers that a test starts. Not a test."""

from __future__ import annotations

import contextlib
import random
import socket

LOWEST, HIGHEST = 10_000, 22_000
"""With the 10,500 above that `lmkv up` takes, still below 32,768, from where on the kernel takes ports for outgoing
connections: none of these is gone before the server has started."""
TRIES = 200


def free_port(*above: int) -> int:
    """A port of 127.0.0.1 that is free now, and so are those `above` it by that much."""
    for _ in range(TRIES):
        port = random.randrange(LOWEST, HIGHEST)
        if all(_is_free(port + distance) for distance in (0, *above)):
            return port
    raise AssertionError(f"no free port with {above} above it")


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False
