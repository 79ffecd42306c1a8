"""The gate opens at the first real token, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.router import sse
from lmkv.router.sse import Gate, Verdict

from .fakes import DONE, chat_chunk, error_chunk, event, role_chunk, text_chunk

KEEP_ALIVE = b": keep-alive\n\n"


def choice(**members: object) -> bytes:
    return event({"choices": [{"index": 0, **members}]})


@pytest.mark.parametrize(
    ("chunk", "verdict"),
    [
        # before any token
        (role_chunk(), Verdict.HOLD),
        (role_chunk(2), Verdict.HOLD),
        (choice(delta={"role": "assistant"}), Verdict.HOLD),
        (choice(delta={"role": "assistant", "content": None}), Verdict.HOLD),
        (KEEP_ALIVE, Verdict.HOLD),
        (b"event: ping\n\n", Verdict.HOLD),
        (event({"choices": [], "usage": {"prompt_tokens": 3}}), Verdict.HOLD),
        # tokens
        (chat_chunk("a"), Verdict.GO),
        (chat_chunk(""), Verdict.GO),
        (choice(delta={"role": "assistant", "content": "a"}), Verdict.GO),
        (choice(delta={"role": "assistant", "content": "", "tool_calls": [{"index": 0}]}), Verdict.GO),
        (choice(delta={"reasoning": "hm"}), Verdict.GO),
        (choice(delta={"role": "assistant", "content": ""}, finish_reason="stop"), Verdict.GO),
        (text_chunk("a"), Verdict.GO),
        (text_chunk(""), Verdict.GO),
        (text_chunk("", "length"), Verdict.GO),
        (DONE, Verdict.GO),
        # not understood: the client's to judge
        (b"data: not json\n\n", Verdict.GO),
        (b"data: \xff\n\n", Verdict.GO),
        (event({"choices": [{"delta": 7}]}), Verdict.GO),
        # failures
        (error_chunk(), Verdict.ERROR),
        (event({"error": "text"}), Verdict.ERROR),
        (choice(delta={"content": ""}, finish_reason="error"), Verdict.ERROR),
        # incomplete
        (chat_chunk("a")[:-1], Verdict.HOLD),
        (b"", Verdict.HOLD),
    ],
)
def test_verdict_of_one_event(chunk: bytes, verdict: Verdict) -> None:
    gate = Gate()
    assert gate.feed(chunk) is verdict
    assert bytes(gate.held) == chunk


def test_carriage_returns_end_events_too() -> None:
    gate = Gate()
    assert gate.feed(role_chunk().replace(b"\n", b"\r\n")) is Verdict.HOLD
    assert gate.feed(error_chunk().replace(b"\n", b"\r\n")) is Verdict.ERROR


def test_error_is_read() -> None:
    gate = Gate()
    gate.feed(role_chunk() + error_chunk("too long", 400) + DONE)
    assert gate.error is not None
    assert (gate.error.message, gate.error.code) == ("too long", 400)


def test_an_error_behind_a_token_is_not_the_gates_business() -> None:
    assert Gate().feed(role_chunk() + chat_chunk("a") + error_chunk()) is Verdict.GO


def test_echoes_are_held_back() -> None:
    gate = Gate(echoes=2)
    assert gate.feed(role_chunk(0) + role_chunk(1)) is Verdict.HOLD
    assert gate.feed(chat_chunk("the last message", 0) + chat_chunk("the last message", 1)) is Verdict.HOLD
    assert gate.feed(error_chunk()) is Verdict.ERROR
    gate = Gate(echoes=2)
    assert gate.feed(chat_chunk("short", finish="stop")) is Verdict.GO


def test_holding_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_HELD_BYTES", 100)
    gate = Gate()
    assert gate.feed(KEEP_ALIVE * 7) is Verdict.HOLD
    assert gate.feed(KEEP_ALIVE) is Verdict.GO


events_before = st.lists(st.sampled_from([role_chunk(0), role_chunk(1), KEEP_ALIVE]), max_size=5)


@settings(deadline=None)  # a busy machine is no failure
@given(events_before, st.sampled_from([chat_chunk("é\n\n"), error_chunk(), DONE]), st.data())
def test_cuts_do_not_matter(before: list[bytes], last: bytes, data: st.DataObject) -> None:
    stream = b"".join([*before, last])
    expected = Verdict.ERROR if b'"error"' in last else Verdict.GO
    gate, at, verdict = Gate(), 0, Verdict.HOLD
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        verdict = gate.feed(stream[at : at + size])
        at += size
        assert (verdict is Verdict.HOLD) == (at < len(stream))
    assert verdict is expected
    assert bytes(gate.held) == stream
