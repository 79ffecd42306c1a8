"""Transfers between two worker loops with real memory: what arrives, and what must not."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator
from threading import Event
from typing import Any

import msgspec
import pytest
import torch

from lmkv import wire
from lmkv.ids import Epoch, Rank, RequestId, TransferId
from lmkv.transfer.events import Peer
from lmkv.transfer.prompt import PROMPT_FAULT, Prompt
from lmkv.transport import OpId, PeerId
from lmkv.vllm.checking import ALL_PPM, is_checked
from lmkv.vllm.commands import Expected, Preempted
from lmkv.vllm.specs import BlockRange, ExpectSpec

from .loop_bed import PROMPT, Pair, until

T = TransferId("t" * 32)
FROM, INTO = (3, 7, 1, 10), (2, 9, 5, 4)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_the_prompt_arrives(pair: Pair) -> None:
    pair.expect(T, INTO)
    pair.grant(T, INTO)
    pair.offer(T)
    pair.compute(T, FROM)
    assert pair.report(T).outcome == "loaded"
    assert torch.equal(pair.decode.kv[:, list(INTO)], pair.prefill.kv[:, list(FROM)])
    assert pair.ledger(T)["outcome"] == "sent"


@pytest.mark.parametrize("grant_first", [False, True])
@pytest.mark.parametrize(
    "other",
    [Prompt(b"q" * 16, PROMPT.tokens), Prompt(PROMPT.digest, PROMPT.tokens - 1), Prompt(b"", PROMPT.tokens)],
    ids=["digest", "length", "unknown"],
)
def test_kv_of_another_prompt_never_arrives(pair: Pair, other: Prompt, grant_first: bool) -> None:
    before = pair.decode.kv.clone()
    pair.expect(T, INTO)
    if grant_first:
        pair.grant(T, INTO)
    pair.offer(T, other)
    pair.compute(T, FROM)
    if not grant_first:
        pair.grant(T, INTO)
    report = pair.report(T)
    assert (report.outcome, report.drained) == ("failed", True) and report.reason.startswith(PROMPT_FAULT)
    ledger = pair.ledger(T)
    assert (ledger["outcome"], ledger["writes"]) == ("failed", 0) and ledger["reason"].startswith(PROMPT_FAULT)
    assert torch.equal(pair.decode.kv, before), "nothing was written"


def run_one(pair: Pair) -> str:
    pair.expect(T, INTO)
    pair.grant(T, INTO)
    pair.offer(T)
    pair.compute(T, FROM)
    report = pair.report(T)
    return report.outcome if report.outcome == "loaded" else report.reason


# --- checksums ---


def test_a_sample_is_the_same_on_both_sides_and_about_as_large_as_asked() -> None:
    seqs = [seq for seq in range(4000) if is_checked(ALL_PPM // 4, T, Epoch(1), Rank(0), seq)]
    assert 850 < len(seqs) < 1150
    assert is_checked(ALL_PPM, T, Epoch(1), Rank(0), 7) and not is_checked(0, T, Epoch(1), Rank(0), 7)


@pytest.mark.parametrize(("policy", "right"), [("full", False), ("auto", False), ("sample", False), ("off", True)])
def test_a_sender_cannot_leave_out_what_the_receiver_demands(
    policy: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(kv_verify=policy, kv_verify_share=1.0)
    try:
        monkeypatch.setattr(pair.prefill.loop._sending, "_checksum", lambda *_: None)
        outcome = run_one(pair)
        assert outcome == "loaded" if right else "carries no checksum" in outcome
    finally:
        pair.close()


def test_zero_is_a_checksum_like_any_other(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.prefill.loop._sending, "_checksum", lambda *_: 0)
    assert "is corrupt" in run_one(pair)


@pytest.mark.parametrize("policy", ["off", "sample", "full"])
def test_each_policy_loads(policy: str) -> None:
    pair = Pair(kv_verify=policy)
    try:
        assert run_one(pair) == "loaded"
    finally:
        pair.close()


# --- a preemption that cannot wait ---


def overwrite(pair: Pair) -> None:
    """As the engine does once it has waited for long enough: another request's KV lies in the blocks."""
    pair.prefill.loop._sending.revoke([T])
    ctypes.memset(pair.prefill.kv.data_ptr(), 0x5A, pair.prefill.kv.nbytes)


@pytest.mark.parametrize("policy", ["off", "full"])
@pytest.mark.parametrize("when", ["begun", "checksummed", "posted", "completed"])
def test_a_revoked_transfer_never_counts(when: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine thread overwrites wherever the loop might be."""
    pair = Pair(kv_verify=policy)
    sending, transport = pair.prefill.loop._sending, pair.prefill.loop._transport
    checksum, write, completed = sending._checksum, transport.write, sending.completed

    reported = Event()

    def late_completed(*given: Any) -> None:
        reported.wait(5)  # decode hears of the write's end at once, prefill's loop only now
        completed(*given)

    def then_checksum(*given: Any) -> int | None:
        overwrite(pair)  # the checksum is made of the other request's bytes, and would be right
        return checksum(*given)

    def checksum_then(*given: Any) -> int | None:
        made = checksum(*given)
        overwrite(pair)
        return made

    def write_then(*given: Any) -> Any:
        overwrite(pair)  # the bytes that are posted are those of the other request
        return write(*given)

    def then_completed(*given: Any) -> None:
        overwrite(pair)
        completed(*given)

    names = {"begun": then_checksum, "checksummed": checksum_then, "posted": write_then, "completed": then_completed}
    try:
        name = {"posted": "write", "completed": "completed"}.get(when, "_checksum")
        right = pair.prefill.kv[:, list(FROM)].clone()
        pair.expect(T, INTO)
        pair.offer(T)
        pair.compute(T, FROM)
        until(lambda: T in sending._sources and sending._sources[T].fan.done)
        monkeypatch.setattr(transport if when == "posted" else sending, name, names[when])
        if when == "begun" and policy == "full":
            monkeypatch.setattr(sending, "completed", late_completed)
        pair.grant(T, INTO)  # last, so that all writes and the seal leave in one go
        report = pair.report(T)
        reported.set()
        assert pair.ledger(T)["outcome"] == "failed"
        if (when, policy) == ("completed", "full") and report.outcome == "loaded":
            assert torch.equal(pair.decode.kv[:, list(INTO)], right), (
                "good bytes had landed, checked and sealed, before"
            )
        else:
            assert report.outcome == "failed"
    finally:
        pair.close()


def test_giving_up_a_preemption_ends_the_transfer(pair: Pair) -> None:
    pair.expect(T, INTO)
    pair.grant(T, INTO)
    pair.offer(T)
    pair.compute(T, FROM[:2], last=False)
    sending = pair.prefill.loop._sending
    pair.prefill.loop.revoke((T,))
    assert pair.report(T).outcome == "failed"
    assert pair.ledger(T)["outcome"] == "failed"
    assert not sending._revoked, "nothing is remembered of an ended transfer"


def test_a_revoke_that_comes_before_its_offer_is_not_lost(pair: Pair) -> None:
    """A loop that stood still for longer than the preemption's fence takes all of it at once, the offer first."""
    pair.prefill.loop._sending.revoke((T,))
    pair.offer(T)
    pair.compute(T, FROM[:2], last=False)
    pair.prefill.loop.submit(Preempted((T,), gave_up=True))
    assert pair.ledger(T)["outcome"] == "failed"
    pair.expect(T, INTO)
    pair.grant(T, INTO)
    assert pair.report(T).outcome == "failed"
    assert not pair.prefill.loop._sending._revoked


# --- cut off, and back ---


def reset_connection(pair: Pair) -> None:
    """The data plane's connection between the two breaks (tcp://), and both have noticed."""
    name = pair.prefill.loop._transport.name
    channel = pair.decode.loop._transport._peers[name].initiator.channel  # type: ignore[attr-defined]
    channel.socket.shutdown(socket.SHUT_RDWR)
    for side in (pair.decode, pair.prefill):
        until(lambda side=side: any(side.introduced()))
        # Engines try again while the other side still holds them for lost; here the first try is to succeed.
        side.loop._transport._lost_names.clear()  # type: ignore[attr-defined]


def test_a_pair_that_was_cut_off_works_again_without_a_restart() -> None:
    """Over tcp://, which closes both directions. The old grant is void, the next one is served."""
    pair = Pair("tcp://127.0.0.1:0", lease_s=5.0)
    try:
        pair.expect(T, INTO)
        pair.grant(T, INTO)
        pair.offer(T)
        pair.compute(T, FROM[:2], last=False)
        reset_connection(pair)
        assert pair.report(T).outcome == "failed"
        before = pair.decode.kv.clone()
        pair.introduce(number=1)
        pair.compute(T, FROM[2:], lo=2)
        assert pair.ledger(T)["outcome"] in ("failed", "peer_lost")
        assert torch.equal(pair.decode.kv, before), "a grant from before the pair was made anew is void"
        again = TransferId("u" * 32)
        pair.expect(again, INTO, number=1)
        pair.grant(again, INTO, pair=1)
        pair.offer(again)
        pair.compute(again, FROM)
        assert pair.report(again).outcome == "loaded"
    finally:
        pair.close()


@pytest.mark.parametrize(("number", "drained"), [(0, True), (1, False)])
def test_a_fence_counts_for_the_pair_that_was_lost_and_for_no_later_one(
    number: int, drained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank hears of a grant when it has no such peer: of the pair before, nothing lands any more. Of a later one,
    which it has not been introduced to, other ranks of prefill may know."""
    pair = Pair("tcp://127.0.0.1:0", lease_s=5.0)
    try:
        reset_connection(pair)
        monkeypatch.setattr(pair.decode.loop._receiving, "answer_came", lambda *_: None)  # no Cancelled comes
        pair.expect(T, INTO, number=number)
        report = pair.report(T)
        assert (report.outcome, report.drained) == ("failed", drained)
    finally:
        pair.close()


def test_a_grant_that_comes_before_its_pair_is_kept_for_it(pair: Pair) -> None:
    """Decode has made the pair anew, and its grant overtakes the introduction to it."""
    pair.grant(T, INTO, pair=1)
    pair.offer(T)
    pair.compute(T, FROM)
    until(lambda: T in pair.prefill.loop._sending._sources and pair.prefill.loop._sending._sources[T].fan.done)
    pair.introduce(number=1)
    pair.expect(T, INTO, number=1)
    assert pair.report(T).outcome == "loaded"


def test_a_number_that_is_over_by_the_time_of_the_connection_serves_no_grant() -> None:
    """Mail is slow: prefill connects, and gets a grant, by the number of a pair that decode has lost meanwhile. Its
    blocks have been given to others."""
    pair = Pair("tcp://127.0.0.1:0", lease_s=5.0)
    prefill, decode = pair.prefill, pair.decode
    try:
        reset_connection(pair)
        pair.outbox.send(decode.loop.address, wire.Introduce(prefill.card, decode.card, 1, 1))
        pair.outbox.send(prefill.loop.address, wire.Introduce(decode.card, prefill.card, 0, 1))
        for side in (decode, prefill):
            until(lambda side=side: "" in side.introduced())
        before = decode.kv.clone()
        pair.grant(T, INTO)
        pair.offer(T)
        pair.compute(T, FROM)
        until(lambda: T in prefill.loop._sending._sources and prefill.loop._sending._sources[T].fan.done)
        assert not prefill.loop._sending._sources[T].grants
        pair.outbox.send(prefill.loop.address, wire.Introduce(decode.card, prefill.card, 1, 1))
        assert pair.ledger(T)["outcome"] != "sent"
        assert torch.equal(decode.kv, before)
        again = TransferId("u" * 32)
        pair.expect(again, INTO, number=1)
        pair.grant(again, INTO, pair=1)
        pair.offer(again)
        pair.compute(again, FROM)
        assert pair.report(again).outcome == "loaded"
    finally:
        pair.close()


def wait_for_slots(pair: Pair) -> None:
    """Prefill has a grant that names no blocks, and gets no slot for it."""
    card = pair.decode.card
    worker = msgspec.structs.replace(card.workers[0], slot_bytes=1 << 20)
    pair.decode.card = msgspec.structs.replace(card, workers=(worker,))
    pair.introduce(number=1)
    pair.grant(T, INTO, landing=True, pair=1)
    pair.offer(T)
    pair.compute(T, FROM)
    sources = pair.prefill.loop._sending._sources
    until(lambda: T in sources and sources[T].grants and sources[T].fan.done)


def test_what_waits_for_slots_of_an_old_pair_ends_with_it(pair: Pair) -> None:
    """A decode rank with a new data plane lends no slot for what it granted before, and does not cancel it either; its
    beats go on. Prefill's blocks would be held for good."""
    wait_for_slots(pair)
    pair.introduce(number=2)
    assert pair.ledger(T)["outcome"] == "failed"


def test_who_was_granted_slots_hears_that_none_will_come(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair was lost between the grant and the step that tells a decode rank of it; the writer is another rank."""
    receiving, sent = pair.decode.loop._receiving, []
    monkeypatch.setattr(receiving, "_rank", Rank(1))
    monkeypatch.setattr(receiving._peers, "tell", lambda peer, _: sent.append(peer))
    pair.outbox.send(pair.decode.loop.address, wire.Dismiss(pair.prefill.incarnation, dead=False))
    until(lambda: pair.decode.loop._peers.met(pair.prefill.incarnation) is None)
    blocks, tokens = (BlockRange(0, 0, INTO),), (0, PROMPT.tokens)
    spec = ExpectSpec(T, RequestId("d"), Epoch(1), pair.prefill.incarnation, 0, blocks, tokens, ((0, len(INTO)),))
    pair.decode.submit(Expected((spec,)))
    report = pair.report(T)
    assert (report.outcome, report.drained, report.slots) == ("failed", True, 0)
    assert set(sent) == {Peer(pair.prefill.incarnation, Rank(0))}
    answer = wire.Cancelled(pair.prefill.incarnation, Rank(0), T, Epoch(1))
    pair.outbox.send(pair.decode.loop.address, answer)
    until(lambda: receiving._machine.active == 0)


def test_a_quarantine_that_lasts_too_long_is_ended_by_a_new_data_plane(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, on another host as its card says, falls silent with a grant of ours."""
    loop = pair.decode.loop
    pair.expect(T, INTO)
    until(lambda: loop._receiving.holds(Peer(pair.prefill.incarnation, Rank(0))))
    monkeypatch.setattr(loop._receiving, "answer_came", lambda *_: None)  # no Cancelled comes
    replaced: list[str] = []

    def replace(name: str) -> tuple[list[OpId], list[PeerId]]:
        replaced.append(name)
        return [], []

    monkeypatch.setattr(loop._transport, "replace", replace)
    far = wire.ProcessCard("elsewhere", "pid:[1]", 1, 1)
    card = pair.prefill.card
    worker = msgspec.structs.replace(card.workers[0], process=far)
    pair.prefill.card = msgspec.structs.replace(card, workers=(worker,))
    pal = loop._peers.find(Peer(pair.prefill.incarnation, Rank(0)))
    assert pal is not None
    pal.worker = worker
    pair.outbox.send(loop.address, wire.Dismiss(pair.prefill.incarnation, dead=False))
    assert not pair.report(T, "failed").drained and not replaced
    monkeypatch.setattr(loop._peers._departed, "_quarantine_s", 0.1)
    assert pair.report(T, "drained").drained
    assert len(replaced) == 1
    until(lambda: any(isinstance(x.message, wire.Replaced) for x in pair.decode.engine.receive()))
