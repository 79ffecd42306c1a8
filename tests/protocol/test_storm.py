"""The same hostile world driven by seeds: long runs at an even mix, where Hypothesis prefers short and strange ones.

A failure carries the whole history of the run. `LMKV_STORMS=20000` searches for longer.
"""

from __future__ import annotations

import os
import random

import pytest

from .test_machines import TIDS, Hostile, HostileTwoRanks
from .things import PROMPT
from .world import World

STORMS = int(os.environ.get("LMKV_STORMS", "250"))
GRANTS = (PROMPT, PROMPT, PROMPT, ((1, 4), (0, 3)), ((4, 4), (2, 3)), ((0, 0), (0, 0)), ((0, 5), (0, 3)))
WEIGHTS = {"go_on": 10, "messages": 3, "duplicate": 2, "wait": 3, "offer": 3, "grant": 2, "expect": 2, "fault": 2}
FAULTS = {
    "fail": 5, "fail in part": 3, "preempt": 4, "withdraw": 1, "abandon": 1, "drop": 4, "partition": 2, "suspect": 1,
    "end_prompt": 0.3, "not needed": 0.5, "break link": 0.5, "kill prefill": 0.4, "kill decode": 0.3, "prove": 2,
    "heal": 3, "corrupt": 0.5,
}  # fmt: skip
WAITS = {0.5: 8, 1.0: 6, 3.0: 4, 11.0: 2, 35.0: 1, 61.0: 0.5, 125.0: 0.5}


def choose(dice: random.Random, weights: dict[str, float] | dict[str, int]) -> str:
    return dice.choices(list(weights), list(weights.values()))[0]


def step(machine: Hostile, dice: random.Random) -> None:
    world, pick, tid = machine.world, dice.randrange(1 << 16), dice.choice(TIDS)
    match choose(dice, WEIGHTS):
        case "go_on":
            machine.go_on([dice.randrange(1 << 16) for _ in range(dice.randint(1, 8))])
        case "messages" if world.net:
            machine.all_messages()
        case "duplicate" if world.net:
            machine.one_message(pick, True)
        case "wait":
            machine.wait(dice.choices(list(WAITS), list(WAITS.values()))[0])
        case "offer":
            machine.offer(tid, pick)
        case "grant" if world.decode_alive:
            machine.grant(tid, dice.choice(GRANTS), dice.random() < 0.7, dice.random() < 0.3)
        case "expect" if any(not region.expected for region in world.regions.values()):
            machine.expect()
        case "fault":
            machine.fault(choose(dice, FAULTS), pick, tid, (dice.random() < 0.5, dice.random() < 0.5))


def history(world: World) -> str:
    quiet = ("Heard(", "Tick(")
    lines = (f"{at:7g} {who} {what}" for at, who, what in world.log if not str(what).startswith(quiet))
    return "\n".join(lines)


@pytest.mark.parametrize("kind", [Hostile, HostileTwoRanks], ids=["one rank", "two ranks"])
def test_storms(kind: type[Hostile]) -> None:
    for seed in range(STORMS):
        dice, machine = random.Random(seed), kind()
        try:
            for _ in range((15, 30, 60)[seed % 3]):
                step(machine, dice)
            machine.teardown()
        except Exception as error:
            error.add_note(f"storm {seed}:\n{history(machine.world)}")
            raise
