"""A device in host memory in the place of torch.cuda: it records every call, and events pass when a test says so."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


class Stream:
    """What is enqueued is done at once (by the CPU); only events are late."""

    def __init__(self, owner: FakeModule, name: str) -> None:
        self.owner, self.name = owner, name

    def synchronize(self) -> None:
        self.owner.note("synchronize", self.name)
        self.owner.fail_if_told()
        self.owner.pass_events(self)


class Event:
    def __init__(self, owner: FakeModule) -> None:
        self.owner = owner
        self.stream: Stream | None = None
        self.passed = False

    def record(self, stream: Stream) -> None:
        self.owner.note("record", stream.name)
        self.stream = stream
        self.owner.events.append(self)

    def query(self) -> bool:
        self.owner.note("query")
        self.owner.fail_if_told()
        return self.passed


@dataclass
class FakeModule:
    """As much of torch.cuda as lmkv uses. `calls`: (name of the thread, call, what it was given)."""

    calls: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    failing: str = ""
    """Every call that waits for the device raises this."""
    host_error: int = 0
    """What the runtime answers to calls on host memory."""
    made: int = 0

    def __post_init__(self) -> None:
        self._current = threading.local()
        self._default = Stream(self, "default")

    # --- what torch.cuda has ---

    def set_device(self, index: int) -> None:
        self.note("set_device", index)
        self.fail_if_told()

    def Stream(self, device: object) -> Stream:
        self.made += 1
        return Stream(self, f"stream-{self.made}")

    def set_stream(self, stream: Stream) -> None:
        self.note("set_stream", stream.name)
        self._current.stream = stream

    def current_stream(self, device: object) -> Stream:
        found: Stream = getattr(self._current, "stream", self._default)
        return found

    def Event(self) -> Event:
        return Event(self)

    def cudart(self) -> FakeModule:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.note("cudaHostRegister", address, size, flags)
        return self.host_error

    def cudaHostUnregister(self, address: int) -> int:
        self.note("cudaHostUnregister", address)
        return self.host_error

    # --- for tests ---

    def note(self, call: str, *given: Any) -> None:
        self.calls.append((threading.current_thread().name, call, given))

    def fail_if_told(self) -> None:
        if self.failing:
            raise RuntimeError(self.failing)

    def pass_events(self, stream: Stream | None = None) -> None:
        """The device has come so far: all events have passed, or those of one stream."""
        for event in self.events:
            event.passed = event.passed or stream is None or event.stream is stream

    def names(self, thread: str = "") -> list[str]:
        """The calls of a thread, or all of them."""
        return [call for who, call, _ in self.calls if not thread or who == thread]
