"""What a world counts of its engines' inner life: the rare events that a run must have met."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

from lmkv import wire

from .engine import SimEngine


def watch(engine: SimEngine, events: Counter[str]) -> None:
    """Wraps methods of the engine's connector halves; they behave as before."""
    decode = engine.scheduler.connector._scheduler._decode
    _before(decode, "_miss", lambda transfer, kind, reason: events.update({f"why:{kind}:{_plain(reason)}": 1}))
    for rank in engine.runner.ranks:
        loop = rank.connector._worker._loop
        _before(loop._sending, "grant_came", lambda grant, now_s, s=loop._sending: _grant(s, grant, events))
        _before(loop._sending, "preempted", lambda tids, *_, s=loop._sending: _preempted(s, tids, events))
        _before(loop._receiving._landing, "take_out", lambda *_: events.update({"landing_conversion": 1}))


def _before(owner: Any, name: str, count: Callable[..., None]) -> None:
    method = getattr(owner, name)

    def watched(*args: Any) -> Any:
        count(*args)
        return method(*args)

    setattr(owner, name, watched)


def _grant(sending: Any, grant: wire.Grant, events: Counter[str]) -> None:
    source = sending._sources.get(grant.transfer_id)
    if source is None or not source.trace.offered_s:
        events["grant:early"] += 1
    elif source.fan.done:
        events["grant:late"] += 1
    else:
        events["grant:in_time"] += 1


def _preempted(sending: Any, tids: tuple[str, ...], events: Counter[str]) -> None:
    lanes = [lane for tid in tids if tid in sending._sources for lane in sending._sources[tid].fan.ids]
    events["preempted:being_sent"] += any(sending._machine.in_flight(lane) for lane in lanes)


def _plain(reason: str) -> str:
    """Without what differs from one to the next, and no longer than some words."""
    return textwrap.shorten(re.sub(r"[0-9a-f]{8,}|\d+", "#", reason), 80, placeholder="")
