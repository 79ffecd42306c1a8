"""One completion request, timed at the client: from sending it to its first streamed token.

A connection is made anew for each request, for every method alike: an engine that was paused for longer than its
keep-alive time would close an idle one under our hands.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.errors import BenchError

REQUEST_DEADLINE_S = 90.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a streamed completion brought. `cached_tokens`: prompt tokens that the engine did not compute itself."""

    first_token_s: float
    text: str
    cached_tokens: int


def connect() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True),
        timeout=aiohttp.ClientTimeout(total=REQUEST_DEADLINE_S),
    )


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise BenchError(f"{url} did not answer within {REQUEST_DEADLINE_S:.0f} s") from None
    except aiohttp.ClientError as error:
        raise BenchError(f"{url}: {error!r}; did its engine end? see its log") from None


def _body(prompt: Sequence[int], max_tokens: int, kv_transfer_params: dict[str, Any] | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "bench",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return body if kv_transfer_params is None else {**body, "kv_transfer_params": kv_transfer_params}


def _headers(request_id: str | None) -> dict[str, str]:
    return {} if request_id is None else {"X-Request-Id": request_id}


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    max_tokens: int,
    kv_transfer_params: dict[str, Any] | None = None,
    request_id: str | None = None,
) -> Reply:
    """`first_token_s` is on the clock of time.perf_counter()."""
    body = _body(prompt, max_tokens, kv_transfer_params)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    first_token_s: float | None = None
    text: list[str] = []
    cached_tokens = 0
    with _explained(url):
        async with session.post(f"{url}/v1/completions", json=body, headers=_headers(request_id)) as response:
            await _check(response)
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now_s = time.perf_counter()
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise BenchError(f"{url} broke off the stream: {event['error']}")
                if event.get("choices"):
                    first_token_s = now_s if first_token_s is None else first_token_s
                    text.append(event["choices"][0]["text"])
                details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                cached_tokens = details.get("cached_tokens") or cached_tokens
    if first_token_s is None:
        raise BenchError(f"{url} ended the stream without a token")
    return Reply(first_token_s, "".join(text), cached_tokens)


async def prefill(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    kv_transfer_params: dict[str, Any] | None,
    request_id: str | None = None,
) -> dict[str, Any]:
    """A prefill engine's part: one token, not streamed. Returns the response's kv_transfer_params."""
    body = _body(prompt, 1, kv_transfer_params)
    with _explained(url):
        async with session.post(f"{url}/v1/completions", json=body, headers=_headers(request_id)) as response:
            await _check(response)
            answer = await response.json()
    return answer.get("kv_transfer_params") or {}


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise BenchError(f"{response.url} answered {response.status}: {(await response.text())[:500]}")
