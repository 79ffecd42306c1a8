"""Connections are confirmed by their receiver before grants are served over them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lmkv import wire
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.transport import Notification
from lmkv.vllm.letters import Letters
from lmkv.vllm.pal import AGAIN_S, Loss

from .peers_bed import PEER, THEM, Bench, running_bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    with running_bench() as made:
        yield made


def test_a_connection_counts_once_the_peer_confirms_it_in_the_pair_that_is_known(bench: Bench) -> None:
    bench.peers.introduce(msgspec.structs.replace(bench.introduction, pair=2), bench.now_s)
    bench.run()
    pal = bench.peers.find(PEER)
    assert pal is not None and pal.ready and not bench.peers.is_confirmed(THEM)
    (came,) = [event for event in bench.theirs.transport.poll() if isinstance(event, Notification)]
    assert wire.decode_note(came.payload) == wire.WarmNote(Incarnation("us"), pal.serial)
    for serial, number in ((pal.serial, 1), (pal.serial + 1, 2), (pal.serial - 1, 2)):
        assert not bench.peers.confirmed(wire.Warmed(THEM, Rank(0), serial, number))
        assert not bench.peers.is_confirmed(THEM)
    bench.run(AGAIN_S)
    assert any(isinstance(event, Notification) for event in bench.theirs.transport.poll()), "it asks again"
    assert bench.peers.confirmed(wire.Warmed(THEM, Rank(0), pal.serial, 2)) and bench.peers.is_confirmed(THEM)
    assert not bench.peers.confirmed(wire.Warmed(THEM, Rank(0), pal.serial, 2)), "told once"
    bench.peers.introduce(msgspec.structs.replace(bench.introduction, pair=3), bench.now_s)
    assert not bench.peers.is_confirmed(THEM)


def test_a_connection_is_confirmed_with_our_number_also_if_it_was_first(bench: Bench) -> None:
    def told() -> list[wire.Warmed]:
        assert bench.worker.socket.poll(2000)
        return [x.message for x in bench.worker.receive() if isinstance(x.message, wire.Warmed)]

    name = bench.theirs.transport.name
    bench.peers.warm_note_came(name, wire.WarmNote(THEM, 7))
    bench.peers.introduce(msgspec.structs.replace(bench.introduction, ours=5), bench.now_s)
    bench.run()
    assert told() == [wire.Warmed(Incarnation("us"), Rank(0), 7, 5)]
    bench.peers.warm_note_came(name, wire.WarmNote(THEM, 8))
    bench.run(2)
    assert told() == [wire.Warmed(Incarnation("us"), Rank(0), 8, 5)]


def test_a_pair_that_was_fenced_is_not_taken_up_under_its_number(bench: Bench) -> None:
    """Our engine introduces the peer once more, and has not heard yet that it is lost: nobody may hear that the old
    number holds."""
    numbered = msgspec.structs.replace(bench.introduction, ours=5)
    bench.peers.introduce(numbered, bench.now_s)
    bench.run()
    assert bench.told() == [""]
    bench.peers.warm_note_came(bench.theirs.transport.name, wire.WarmNote(THEM, 7))
    bench.peers.transport_lost(bench.theirs.transport.name, "reset")
    bench.ours.transport.disconnect(bench.theirs.transport.name)
    assert bench.gone == [(PEER, Loss.FENCED)] and bench.told() == ["reset"]
    bench.peers.introduce(numbered, bench.now_s)
    assert bench.told() == ["the pair was lost while it was made"] and bench.peers.find(PEER) is None
    bench.run()
    bench.worker.receive()
    bench.peers.introduce(msgspec.structs.replace(numbered, ours=6), bench.now_s)
    bench.run()
    assert bench.told() == [""]
    assert not any(isinstance(letter.message, wire.Warmed) for letter in bench.worker.receive()), (
        "of another connection"
    )


def test_a_write_over_an_older_connection_warms_no_later_one(bench: Bench) -> None:
    """It hangs there, and neither keeps us from warming the new connection nor makes it ready when it ends."""
    bench.peers.introduce(bench.introduction, bench.now_s)
    (stuck,) = bench.peers._warming._ops
    bench.peers.dismiss(THEM, dead=False)
    renewed = msgspec.structs.replace(bench.introduction, pair=1, ours=1)
    bench.peers.introduce(renewed, bench.now_s)
    assert len(bench.peers._warming._ops) == 2
    assert bench.peers.completed(stuck, None, bench.now_s)
    pal = bench.peers.find(PEER)
    assert pal is not None and not pal.ready and bench.peers.warming
    (fresh,) = bench.peers._warming._ops
    assert bench.peers.completed(fresh, None, bench.now_s)
    assert pal.ready and bench.told() == [""]


def test_grants_are_served_at_once_where_no_connection_is_needed() -> None:
    """Other ranks have the heads that decode needs: nobody confirms anything to this one."""
    served: list[Incarnation] = []
    peers = SimpleNamespace(introduce=lambda message, now_s: None, is_confirmed=lambda incarnation: True)
    sending = SimpleNamespace(
        introduced=lambda incarnation, now_s: None, confirmed=lambda incarnation, now_s: served.append(incarnation)
    )
    nothing: Any = SimpleNamespace()
    card = wire.EngineCard(EngineName("e"), THEM, "tcp://127.0.0.1:1", "decode", {}, {}, (16,), ())
    letters = Letters(Rank(1), peers, sending, nothing, None, nothing)  # type: ignore[arg-type]
    letters.take(wire.Introduce(card, card), 0.0)
    assert served == [THEM]
