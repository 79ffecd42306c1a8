"""Two ranks with their engines' endpoints and lookups, and a pool node, in one thread: a page is stored and loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.simulation.builders import Engine, start_node
from tests.simulation.virtual import SteppedRuntime
from tests.vllm.pool_bed import CHUNK, NAMESPACE

ROOT = Path(__file__).resolve().parents[2]
Trace = list[tuple[float, str, str]]


def handed_on(seed: int, reader_host: str) -> Trace:
    """One engine stores, another one loads; returns the turns."""
    with SteppedRuntime(seed, traced=100_000) as world:
        node = start_node(world)
        writer = Engine(world, "writer", node.card.address)
        reader = Engine(world, "reader", node.card.address, reader_host, seed=2)
        assert world.run_until(lambda: writer.nodes and reader.nodes, 10.0)
        assert reader.nodes == {node.card.incarnation: reader_host == "a"}
        writer.store((3, 1))
        report = reader.load((5, 6))
        assert (report.good, report.reason) == (2 * CHUNK, "")
        assert torch.equal(reader.storage[:, [5, 6]], writer.storage[:, [3, 1]])
        for engine in (writer, reader):
            engine.close()
        node.stop()
        assert world.run_until(lambda: not world.runners, 60.0)
        assert world.network.open_sockets == []
        return list(world.trace)


@pytest.mark.parametrize("reader_host", ["a", "b"])
def test_a_page_is_stored_by_one_engine_and_loaded_by_another(reader_host: str) -> None:
    for seed in range(5):
        handed_on(seed, reader_host)


def test_a_seed_gives_the_same_turns_again() -> None:
    first = handed_on(7, "b")
    assert {part for _, _, part in first} >= {"lmkv-pool", "lmkv-writer-0", "lmkv-endpoint", "lmkv-lookups"}
    assert first == handed_on(7, "b")
    assert first != handed_on(8, "b")


@pytest.mark.timeout(300)
def test_a_seed_gives_the_same_turns_in_another_process() -> None:
    """Whatever the order of its sets."""
    code = "from tests.simulation.test_stepped import handed_on; print(handed_on(3, 'b'))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert told.strip() == str(handed_on(3, "b"))


def test_the_death_of_a_node_is_noticed_and_its_successor_used() -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world, listen="tcp://127.0.0.1:18300")
        engine = Engine(world, "engine", node.card.address)
        assert world.run_until(lambda: engine.nodes, 10.0)
        world.processes["node"].kill()
        assert world.run_until(lambda: not engine.nodes, 20.0)
        second = start_node(world, listen="tcp://127.0.0.1:18300")
        assert world.run_until(lambda: engine.nodes == {second.card.incarnation: True}, 20.0)
        engine.store((3,))
        assert engine.load((5,)).good == CHUNK


def test_the_death_of_an_engine_frees_what_it_held() -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world)
        engine = Engine(world, "engine", node.card.address)
        assert world.run_until(lambda: engine.nodes, 10.0)
        engine.store((3,))
        engine.seek(1)
        assert len(node._leases) == 1
        engine.process.kill()
        assert world.run_until(lambda: len(node._leases) == 0, 60.0)


def test_a_cut_network_is_a_miss_and_no_hang() -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world)
        engine = Engine(world, "engine", node.card.address, host="b")
        assert world.run_until(lambda: engine.nodes, 10.0)
        engine.store((3,))
        engine.seek(1)
        world.network.cut("a", "b")
        lookup = engine.lookups.seek(NAMESPACE, engine.keys(1))
        began_s = world.clock()
        assert engine.process.runtime.wait(lookup.done, 10.0)
        assert lookup.chunks == 0 and world.clock() - began_s < 1.0
        world.network.heal("a", "b")
        assert engine.seek(1).chunks == 1


def test_a_page_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world, disk=str(tmp_path), disk_capacity="8MiB", disk_segment="1MiB")
        engine = Engine(world, "engine", node.card.address)
        assert world.run_until(lambda: engine.nodes, 10.0)
        engine.store((3, 1))
        assert world.run_until(lambda: node._index.counters["spill:DISK"] == 2, 10.0)
        node.stop()
        assert world.run_until(lambda: not node._runner.alive, 60.0)
        world.processes["node"].kill()
        second = start_node(world, listen=node.card.address, disk=str(tmp_path), disk_capacity="8MiB")
        assert world.run_until(lambda: engine.nodes == {second.card.incarnation: True}, 20.0)
        assert engine.seek(2, wait_s=5.0).chunks == 2
        assert engine.load((5, 6)).good == 2 * CHUNK
        assert torch.equal(engine.storage[:, [5, 6]], engine.storage[:, [3, 1]])
