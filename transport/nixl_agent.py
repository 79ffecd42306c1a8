"""Opening a NIXL agent with the progress thread that was asked for. Gets NIXL's modules; imports nothing of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)

_EVENT_DELAY_US = 1000
"""Ceiling on the event-driven progress thread's sleep; UCX wakes it earlier when there is work."""


@contextmanager
def _event_driven(bindings: Any) -> Iterator[list[int]]:
    """While inside, agents get a progress thread that sleeps; yields a list that holds the delays given to it.

    The wrapper always assigns `pthrDelay = 0`, which makes the thread spin a core. Empty on exit: it did not take.
    """
    taken: list[int] = []
    original = bindings.nixlAgentConfig

    class SleepingConfig(original):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            if name == "pthrDelay":
                value = _EVENT_DELAY_US
                taken.append(_EVENT_DELAY_US)
            super().__setattr__(name, value)

    bindings.nixlAgentConfig = SleepingConfig
    try:
        yield taken
    finally:
        bindings.nixlAgentConfig = original


def _event_possible(bindings: Any) -> bool:
    """Whether this NIXL lets the delay be set and keeps it."""
    try:
        config = bindings.nixlAgentConfig()
        config.pthrDelay = _EVENT_DELAY_US
        return bool(config.pthrDelay == _EVENT_DELAY_US)
    except (AttributeError, TypeError) as error:
        _log.debug("nixlAgentConfig.pthrDelay cannot be set: %s", error)
        return False


def open_agent(api: Any, bindings: Any, name: str, progress: str) -> tuple[Any, str]:
    """The agent without back ends, and the progress mode it really has."""
    if progress == "event" and _event_possible(bindings):
        with _event_driven(bindings) as taken:
            agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=True, backends=[]))
        if taken:
            return agent, "event"
        del agent
    if progress == "event":
        _log.warning("this NIXL's progress thread would spin a core; nixl:// falls back to progress=poll")
    return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[])), "poll"
