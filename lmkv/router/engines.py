"""The engines behind the router: where they are, whether they live, what is in flight there."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lmkv.addresses import split_address
from lmkv.errors import ConfigError, RouterError
from lmkv.ids import EngineName, Incarnation

from .bodies import Side
from .policy import Candidate
from .settings import RouterSettings

logger = logging.getLogger(__name__)

CONTROL_PORT_OFFSET = 10000
"""An engine listens for control messages at its HTTP port plus this, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """`name` is host:port of `url`; `control` is a tcp:// address."""

    side: Side
    name: EngineName
    url: str
    control: str


@dataclass(slots=True, eq=False)
class Engine:
    """Health is the monitor's to write (or whoever lost a connection, by `mark_down`); counts are the attempts'."""

    spec: EngineSpec
    healthy: bool = False
    trouble: str = "not polled yet"
    """Why it is not healthy; empty while it is."""
    is_plain: bool = False
    """Not healthy, but only because lmkv is dead in it: requests are served, without KV from elsewhere."""
    incarnation: Incarnation | None = None
    """As last told over the control plane."""
    paired_with: frozenset[str] = frozenset()
    """Incarnations this engine calls ready."""
    control_trouble: str = "not asked yet"
    requests: int = 0
    prompt_bytes: int = 0
    look: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to have the monitor poll now."""

    @property
    def name(self) -> EngineName:
        return self.spec.name

    def mark_down(self, trouble: str) -> None:
        """A connection failed: nothing is sent here until a poll says otherwise, and that poll is due now."""
        if self.healthy:
            logger.warning("%s engine %s is marked down: %s", self.spec.side, self.name, trouble)
        self.healthy = self.is_plain = False
        self.trouble = trouble
        self.look.set()

    def candidate(self) -> Candidate:
        return Candidate(self.name, self.requests, self.prompt_bytes)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "side": self.spec.side,
            "url": self.spec.url,
            "control": self.spec.control,
            "healthy": self.healthy,
            "plain": self.is_plain,
            "trouble": self.trouble,
            "incarnation": self.incarnation,
            "control_trouble": self.control_trouble,
            "requests_in_flight": self.requests,
            "prompt_bytes_in_flight": self.prompt_bytes,
        }


def parse_engine(side: Side, text: str) -> EngineSpec:
    """`http://host:port` or `http://host:port=tcp://host:port`. Raises ConfigError."""
    url, separator, control = text.partition("=")
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    bare = parts.path in ("", "/") and not parts.query and not parts.fragment and "@" not in parts.netloc
    if parts.scheme not in ("http", "https") or not parts.hostname or port is None or not bare:
        raise ConfigError(
            f"{text!r} is not the address of a {side} engine",
            hint="write it as http://HOST:PORT, or http://HOST:PORT=tcp://HOST:PORT with its control address",
            code="LMKV-C103",
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if not separator:
        if port + CONTROL_PORT_OFFSET > 65535:
            raise ConfigError(
                f"{side} engine {text!r}: its control port would be {port + CONTROL_PORT_OFFSET}",
                hint=f"name it: {text}=tcp://{host}:PORT",
                code="LMKV-C103",
            )
        control = f"tcp://{host}:{port + CONTROL_PORT_OFFSET}"
    split_address(control)
    return EngineSpec(side, EngineName(f"{host}:{port}"), f"{parts.scheme}://{host}:{port}", control)


class Engines:
    """All configured engines, in the order of the settings."""

    def __init__(self, settings: RouterSettings) -> None:
        self.prefill = [Engine(parse_engine(Side.PREFILL, text)) for text in settings.prefill]
        self.decode = [Engine(parse_engine(Side.DECODE, text)) for text in settings.decode]
        if not self.decode:
            raise ConfigError("no decode engine is given", hint="add --decode http://HOST:PORT", code="LMKV-C104")
        self.all = [*self.prefill, *self.decode]
        self.by_name = {engine.name: engine for engine in self.all}
        seen: dict[str, str] = {}
        for engine in self.all:
            for address in (engine.spec.name, engine.spec.control):
                if address in seen:
                    raise ConfigError(
                        f"{address} is given twice, as {seen[address]} and as {engine.spec.side} engine",
                        hint="give every engine once, with its own HTTP and control address",
                        code="LMKV-C105",
                    )
                seen[address] = f"{engine.spec.side} engine"

    def serving(self) -> list[Engine]:
        """Decode engines that requests may go to: the healthy ones or, if there is none, those that are plain."""
        return [e for e in self.decode if e.healthy] or [e for e in self.decode if e.is_plain]

    def __getitem__(self, name: str) -> Engine:
        try:
            return self.by_name[EngineName(name)]
        except KeyError:
            raise RouterError(f"no engine is called {name!r}") from None
