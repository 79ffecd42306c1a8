"""As test_survival.py: bugs on purpose in the lookups and in the pool node."""

from __future__ import annotations

from typing import Any

import pytest

from lmkv import poolwire as pw
from lmkv.pool.link import Link
from tests.simulation.builders import Engine, start_node
from tests.simulation.test_survival import bug, engine, works, world
from tests.simulation.virtual import SteppedRuntime
from tests.vllm.pool_bed import NAMESPACE

__all__ = ["engine", "world"]  # fixtures


# --- lookups ---


def test_a_lookup_that_meets_a_bug_finds_nothing(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.store((3,))
    engine.seek(1)
    with monkeypatch.context() as patch:
        patch.setattr(engine.lookups, "_pin", bug)
        lookup = engine.lookups.seek(NAMESPACE, engine.keys(1))
        assert engine.process.runtime.wait(lookup.done, 5.0)
        assert (lookup.chunks, lookup.why) == (0, "failed")
    assert engine.seek(1).chunks == 1


def test_the_death_of_lookups_is_noticed(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.store((3,))
    waiting = engine.lookups.seek(NAMESPACE, engine.keys(1), wait_s=60.0)
    held = engine.seek(1)
    monkeypatch.setattr(engine.lookups._directory, "tick", bug)
    for _ in range(200):
        engine.lookups.release([])
        world.run_for(0.01)
    assert not engine.lookups._runner.alive and not engine.lookups.reachable
    assert waiting.done.is_set()
    late, began_s = engine.lookups.seek(NAMESPACE, engine.keys(1)), world.clock()
    assert engine.process.runtime.wait(late.done, 5.0) and world.clock() == began_s
    assert (late.chunks, late.why) == (0, "closed")
    for _ in range(100):
        engine.lookups.release(held.leases)
        engine.lookups.corrupt(NAMESPACE, held.pages)
        engine.lookups.declare(NAMESPACE, "")
    assert not engine.lookups._released and not engine.lookups._corrupt and not engine.lookups._names
    engine.lookups.close()


# --- the pool node ---


def test_a_node_survives_a_bug_and_answers(world: SteppedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    node = start_node(world)
    link = Link(world.process("user", "z").runtime.context(), node.card.address)
    answers: list[Any] = []
    real = node._desk.take
    monkeypatch.setattr(
        node._desk,
        "take",
        lambda who, message, now_s: (bug if isinstance(message, pw.Drop) else real)(who, message, now_s),
    )
    link.ask(lambda token: pw.Drop(token, bytes(16), b""), pw.Dropped, answers.append, world.clock() + 5.0)
    assert world.run_until(lambda: link.receive(world.clock()) or answers, 1.0)
    assert answers == [None]
    link.ask(pw.Stats, pw.StatsAre, answers.append, world.clock() + 5.0)
    assert world.run_until(lambda: link.receive(world.clock()) or len(answers) == 2, 1.0)
    assert answers[1] is not None and node._index.counters["failure:Drop"] == 1


def test_a_node_survives_a_bug_in_its_own_work(world: SteppedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    node = start_node(world)
    with monkeypatch.context() as patch:
        patch.setattr(node._clients, "tick", bug)
        world.run_for(2.0)
    engine = Engine(world, "engine", node.card.address)
    assert world.run_until(lambda: engine.nodes, 10.0)
    assert works(engine)
    assert node._index.counters["failure:expiry"] > 1
