"""Finds the first real token of an event stream, so that everything before it can still be retried. Pure.

vLLM answers a stream with 200 at once; chat then sends one role-only event a choice, and a request that failed sends
an `error` event after them. Only the first events are read here: after the verdict bytes are forwarded unread.
"""

from __future__ import annotations

from enum import Enum

import msgspec

MAX_HELD_BYTES = 64 << 20
"""More than this is not held back: a stream that long without a token is forwarded as it is."""


class Verdict(Enum):
    HOLD = "hold"
    GO = "go"
    ERROR = "error"


class StreamError(msgspec.Struct, frozen=True):
    """`error` of an error event, as far as it is understood."""

    message: str = ""
    code: int = 500


_NULL = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    delta: dict[str, msgspec.Raw] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: msgspec.Raw = _NULL


_event_decoder = msgspec.json.Decoder(_Event)
_error_decoder = msgspec.json.Decoder(StreamError)
_EMPTY_CONTENT = (b'""', b"null")


class Gate:
    """Feed it the stream's bytes until the verdict is not HOLD; `held` is all that was fed."""

    def __init__(self, echoes: int = 0) -> None:
        self.held = bytearray()
        self.error: StreamError | None = None
        self._read_bytes = 0
        self._searched_bytes = 0
        self._echoes = echoes

    def feed(self, chunk: bytes) -> Verdict:
        self.held += chunk
        while (event := self._next_event()) is not None:
            verdict = self._judge(event)
            if verdict is not Verdict.HOLD:
                return verdict
        return Verdict.GO if len(self.held) > MAX_HELD_BYTES else Verdict.HOLD

    def _next_event(self) -> bytes | None:
        """The next complete event, without the blank line that ends it."""
        start = max(self._read_bytes, self._searched_bytes)
        ends = [(at, at + len(mark)) for mark in (b"\n\n", b"\r\n\r\n") if (at := self.held.find(mark, start)) >= 0]
        if not ends:
            self._searched_bytes = max(0, len(self.held) - 3)  # a mark may be cut by the end of a chunk
            return None
        start, (end, self._read_bytes) = self._read_bytes, min(ends)
        return bytes(self.held[start:end])

    def _judge(self, event: bytes) -> Verdict:
        data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
        if not data:
            return Verdict.HOLD
        if data == b"[DONE]":
            return Verdict.GO
        try:
            parsed = _event_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Verdict.GO
        if bytes(parsed.error) != b"null":
            self.error = _read_error(parsed.error)
            return Verdict.ERROR
        if any(choice.finish_reason == "error" for choice in parsed.choices):
            self.error = StreamError("finish_reason is 'error'")
            return Verdict.ERROR
        if all(_is_role_only(choice) for choice in parsed.choices):
            return Verdict.HOLD
        if self._echoes > 0 and all(choice.finish_reason is None for choice in parsed.choices):
            self._echoes -= 1
            return Verdict.HOLD
        return Verdict.GO


def _is_role_only(choice: _Choice) -> bool:
    delta = choice.delta
    return (
        delta is not None
        and choice.finish_reason is None
        and "role" in delta
        and delta.keys() <= {"role", "content"}
        and bytes(delta.get("content", b"null")) in _EMPTY_CONTENT
    )


def _read_error(raw: msgspec.Raw) -> StreamError:
    try:
        return _error_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return StreamError(bytes(raw)[:500].decode(errors="replace"))
