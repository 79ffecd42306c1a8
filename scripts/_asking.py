"""What the demo asks: the router and engines for an answer, a ledger and counters, the pool node for its pages."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _ledger

from lmkv.up.children import Child, ChildError
from lmkv.up.probe import get_json

ANSWER_DEADLINE_S = 300.0
LEDGER_DEADLINE_S = 10.0
STORE_DEADLINE_S = 20.0
COUNT_DEADLINE_S = 5.0
CONTROL_DEADLINE_S = 10.0
POLL_S = 0.2
PAGE_TOKENS = 128
"""`chunk_tokens` of the engines, which the demo leaves as it is."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    prompt_tokens: int
    answer_tokens: int
    first_token_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine has taken out of the pool for one answer."""

    hits: int
    tokens: int


def ask(url: str, request_id: str, options: argparse.Namespace, show: Callable[[str], None]) -> Answer:
    """Streams one greedy chat completion; `show` gets each piece. Raises ChildError."""
    body = {
        "model": options.model.name,
        "messages": [{"role": "user", "content": options.prompt.read_text()}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json", "x-request-id": request_id}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    started_s = time.monotonic()
    first_s, pieces, usage = 0.0, list[str](), dict[str, int]()
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_DEADLINE_S) as answer:
            for line in answer:
                event = _event(line)
                usage = event.get("usage") or usage
                for choice in event.get("choices") or []:
                    if piece := choice.get("delta", {}).get("content"):
                        first_s = first_s or time.monotonic()
                        pieces.append(piece)
                        show(piece)
    except urllib.error.HTTPError as error:
        said = error.read(600).decode(errors="replace")
        raise ChildError(f"{url} answered {error.code} · {said} · read the logs in {options.run}") from None
    except (OSError, ValueError) as error:
        raise ChildError(f"{url} broke off: {error} · read the logs in {options.run}") from None
    done_s = time.monotonic()
    first_ms = ((first_s or done_s) - started_s) * 1000
    counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    return Answer("".join(pieces), *counts, round(first_ms, 1), round((done_s - started_s) * 1000, 1))


def _event(line: bytes) -> dict[str, Any]:
    data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
    event: dict[str, Any] = json.loads(data) if data and data != b"[DONE]" else {}
    if "error" in event:
        raise ValueError(event["error"])
    return event


def ask_watched(url: str, request_id: str, options: argparse.Namespace, watched: list[Child], show: bool) -> Answer:
    """As `ask`; if an engine has died, its own last words are the message."""
    try:
        return ask(url, request_id, options, _print_piece if show else lambda _: None)
    except ChildError:
        for child in watched:
            child.check_alive()
        raise


def _print_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def explain(url: str, request_id: str) -> dict[str, Any]:
    """The router's ledger of the request, as complete as it gets within LEDGER_DEADLINE_S."""
    give_up_s = time.monotonic() + LEDGER_DEADLINE_S
    while True:
        told = get_json(f"{url}/explain/{request_id}")
        if _ledger.is_complete(told) or told.get("mode") != "pd" or time.monotonic() >= give_up_s:
            return told
        time.sleep(POLL_S)


def pages(pool: str) -> int:
    """How many pages the pool node holds. Raises ChildError."""
    from lmkv.control.admin import Admin
    from lmkv.errors import LmkvError

    try:
        with Admin(pool) as admin:
            return int(json.loads(admin.stats().stats)["pages"])
    except LmkvError as error:
        raise ChildError(str(error)) from None


def wait_stored(pool: str, before: int, prompt_tokens: int) -> int:
    """Engines store while they go on: until the prompt's whole pages are there, or time is up. How many there are."""
    give_up_s = time.monotonic() + STORE_DEADLINE_S
    while (there := pages(pool)) < before + prompt_tokens // PAGE_TOKENS and time.monotonic() < give_up_s:
        time.sleep(POLL_S)
    return there


def counted(control: str) -> Loaded:
    """The engine's own counters, from its start. Raises ChildError."""
    from lmkv.control.client import ControlClient
    from lmkv.errors import LmkvError

    async def describe() -> dict[str, int]:
        client = ControlClient()
        try:
            return (await client.describe(control, deadline_s=CONTROL_DEADLINE_S)).counters
        finally:
            await client.close()

    try:
        counters = asyncio.run(describe())
    except LmkvError as error:
        raise ChildError(str(error)) from None
    return Loaded(counters.get("pool:lookup:hit", 0), counters.get("pool:loaded_tokens", 0))


def gained(control: str, before: Loaded) -> Loaded:
    """What has been counted since; an engine's workers tell theirs a moment after the answer."""
    give_up_s = time.monotonic() + COUNT_DEADLINE_S
    while True:
        now = counted(control)
        grown = Loaded(now.hits - before.hits, now.tokens - before.tokens)
        if (grown.hits and grown.tokens) or time.monotonic() >= give_up_s:
            return grown
        time.sleep(POLL_S)
