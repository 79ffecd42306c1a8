"""A client in a process of its own, to be stopped and killed.

Arguments: ADDRESS URL. Commands: `reserve N`, `abandon`, `commit`, `pin`, `store N`, `cut`
(its connections; it does nothing until the next line) on stdin."""

from __future__ import annotations

import json
import os
import select
import sys

from tests.pool.bed import User


def main() -> None:
    user = User(sys.argv[1], name="victim", url=sys.argv[2])
    numbers: list[int] = []
    slots = ()
    print("ready", flush=True)
    while True:
        user.pump_for(0.02)
        if not select.select([sys.stdin], [], [], 0)[0]:
            continue
        command, *words = sys.stdin.readline().split() or ["end"]
        numbers = [int(word) for word in words] or numbers
        match command:
            case "reserve":
                slots = user.reserve(numbers)
                print(json.dumps([slot.offset for slot in slots]), flush=True)
            case "abandon":
                user.abandon(numbers, slots, drained=True)
                print("done", flush=True)
            case "commit":
                print(json.dumps([why.name for why in user.commit(numbers, slots).refusals]), flush=True)
            case "pin":
                print(len(user.pin(numbers, lease_s=60.0).pages), flush=True)
            case "store":
                user.store(*numbers)
                print("done", flush=True)
            case "cut":
                assert user.transport is not None
                _, peers = user.transport.replace(f"victim-{os.urandom(4).hex()}")
                print("done", flush=True)
                sys.stdin.readline()
                for peer in peers:
                    user.access.peer_lost(peer, "for a test")
                user.access.replaced()
                print("done", flush=True)
            case _:
                return


if __name__ == "__main__":
    main()
