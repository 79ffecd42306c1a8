"""How fast plain TCP moves bytes over the link between two namespaces: what a load over it cannot beat.

`python raw_link.py receive ADDRESS BYTES ROUNDS` and `… send ADDRESS BYTES ROUNDS`; the receiver prints seconds, one
line a round, from its request to the last byte in place.
"""

from __future__ import annotations

import socket
import sys
import time

import numpy as np


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def send(address: str, size: int, rounds: int) -> None:
    data = memoryview(np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)).cast("B")
    with socket.create_server(_address(address)) as server:
        connection, _ = server.accept()
        with connection:
            for _ in range(rounds):
                if not connection.recv(1):
                    return
                connection.sendall(data)


def receive(address: str, size: int, rounds: int) -> None:
    place = memoryview(np.ones(size, dtype=np.uint8)).cast("B")
    until_s = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(_address(address), timeout=10)
            break
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
    with connection:
        for _ in range(rounds):
            start_s = time.perf_counter()
            connection.sendall(b"g")
            got = 0
            while got < size:
                count = connection.recv_into(place[got:])
                if not count:
                    raise SystemExit("the sender has gone")
                got += count
            print(time.perf_counter() - start_s, flush=True)


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
