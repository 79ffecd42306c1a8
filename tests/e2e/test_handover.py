"""Prefill pushes, decode answers: real engines, real weights, real NIXL, through the router."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from .bed import PROSE, Client, Engine, eventually
from .conftest import Bed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

BLOCK = 128


def story(n: int) -> str:
    """Natural text that no other test begins with."""
    return f"Letter number {n} of the collection begins here, and nobody has read it before. " + PROSE


@pytest.fixture(autouse=True)
async def clean(bed: Bed, client: Client) -> Any:
    """Every test starts with empty prefix caches and ends with all blocks free on both engines."""

    async def ready() -> bool:
        async with client.session.get(f"{bed.router.url}/readyz") as response:
            return response.status == 200

    await eventually(ready, "the router to be ready")
    await client.all_blocks_free(bed.prefill, bed.decode)
    await client.reset_cache(bed.prefill, bed.decode, bed.plain)
    yield
    await client.all_blocks_free(bed.prefill, bed.decode)


async def prompt_of(bed: Bed, client: Client, n: int, tokens: int) -> list[int]:
    text = story(n)
    while len(ids := await client.tokens(bed.plain, text)) < tokens:
        text += " " + PROSE
    return ids[:tokens]


def sent(attempt: dict[str, Any]) -> dict[str, Any]:
    """Prefill's record of rank 0."""
    rank: dict[str, Any] = attempt["engines"]["prefill"]["ranks"]["0"]
    return rank


def loaded(attempt: dict[str, Any]) -> dict[str, Any]:
    rank: dict[str, Any] = attempt["engines"]["decode"]["ranks"]["0"]
    return rank


async def test_chunked_prompt_overlaps_and_its_bytes_are_equal(bed: Bed, client: Client) -> None:
    """Several chunks: the first WRITE is posted before the last layer is computed, and decode holds prefill's bytes."""
    prompt = await prompt_of(bed, client, 1, 1300)
    reply = await client.complete(bed.router.url, prompt)
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.text == plain.text
    attempt = await client.explain(bed.router, reply.request_id)
    send, receive = sent(attempt), loaded(attempt)
    assert send["outcome"] == "sent" and receive["outcome"] == "loaded"
    assert send["first_post_s"] < send["last_computed_s"] - 0.05
    assert receive["first_landed_s"] < send["last_computed_s"]
    blocks = -(-1300 // BLOCK)
    assert attempt["engines"]["decode"]["granted_blocks"] == blocks
    assert send["bytes"] == receive["bytes"] and send["bytes"] % blocks == 0 and send["writes"] == receive["writes"]
    tid = attempt["transfer_id"]
    ours, theirs = (bed.dumps / f"{tid}-{side}-0-0.kv" for side in ("prefill", "decode"))
    assert ours.stat().st_size == send["bytes"]
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("tokens", [60, BLOCK, 3 * BLOCK, 3 * BLOCK + 1, 700])
async def test_lengths(bed: Bed, client: Client, tokens: int) -> None:
    """Shorter than a block, exact multiples, one more, and something in between."""
    prompt = await prompt_of(bed, client, 100 + tokens, tokens)
    reply = await client.complete(bed.router.url, prompt)
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.text == plain.text
    attempt = await client.explain(bed.router, reply.request_id)
    assert loaded(attempt)["outcome"] == "loaded"
    assert attempt["engines"]["decode"]["granted_blocks"] == -(-tokens // BLOCK)


@pytest.mark.parametrize("held_by", ["prefill", "decode", "both"])
async def test_prefix_hits(bed: Bed, client: Client, held_by: str) -> None:
    """A part of the prompt is cached on one side or on both: only what decode lacks is pushed."""
    prompt = await prompt_of(bed, client, {"prefill": 21, "decode": 22, "both": 23}[held_by], 900)
    for side in (bed.prefill, bed.decode):
        if held_by == "both" or held_by == side.role:
            await client.complete(side.url, prompt[: 4 * BLOCK + 10], max_tokens=1)
    reply = await client.complete(bed.router.url, prompt)
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.text == plain.text
    attempt = await client.explain(bed.router, reply.request_id)
    engines = attempt["engines"]
    assert loaded(attempt)["outcome"] == "loaded"
    assert engines["prefill"]["cached_tokens"] == (4 * BLOCK if held_by != "decode" else 0)
    assert engines["decode"]["first_token"] == (4 * BLOCK if held_by != "prefill" else 0)
    assert engines["decode"]["granted_blocks"] == 8 - (4 if held_by != "prefill" else 0)
    if held_by == "prefill":
        # Cached blocks go at once, before anything is computed.
        assert sent(attempt)["first_post_s"] < sent(attempt)["last_computed_s"]


async def test_full_hit_needs_nothing(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 24, 5 * BLOCK + 1)
    first = await client.complete(bed.router.url, prompt)
    again = await client.complete(bed.router.url, prompt)
    assert first.text == again.text
    attempt = await client.explain(bed.router, again.request_id)
    assert attempt["engines"]["decode"]["not_needed"]
    assert sent(attempt)["outcome"] == "not_needed" and sent(attempt)["bytes"] == 0


async def test_chat_streaming_and_not(bed: Bed, client: Client) -> None:
    question = story(31)[:1800] + "\nWhat is this text about? Answer in one sentence."
    streamed = await client.chat(bed.router.url, question, max_tokens=24, stream=True)
    whole = await client.chat(bed.router.url, question, max_tokens=24)
    plain = await client.chat(bed.plain.url, question, max_tokens=24)
    assert streamed.text == whole.text == plain.text
    assert streamed.chunks > 10
    attempt = await client.explain(bed.router, streamed.request_id)
    assert loaded(attempt)["outcome"] == "loaded"


async def test_completion_streaming(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 32, 400)
    streamed = await client.complete(bed.router.url, prompt, max_tokens=16, stream=True)
    plain = await client.complete(bed.plain.url, prompt, max_tokens=16)
    assert streamed.text == plain.text and streamed.chunks > 5


async def test_ten_at_once(bed: Bed, client: Client) -> None:
    """More than decode has blocks for: some queue for room, all are answered."""
    prompts = [await prompt_of(bed, client, 40 + i, 500 + 60 * i) for i in range(10)]
    replies = await asyncio.gather(*(client.complete(bed.router.url, p, max_tokens=6) for p in prompts))
    plain = await asyncio.gather(*(client.complete(bed.plain.url, p, max_tokens=6) for p in prompts))
    assert [r.text for r in replies] == [r.text for r in plain]
    for reply in replies:
        attempt = await client.explain(bed.router, reply.request_id)
        assert loaded(attempt)["outcome"] == "loaded"


async def test_decode_without_room_queues_then_runs(bed: Bed, client: Client) -> None:
    """Decode's blocks are held by a long answer; the grant comes when it has ended."""
    hog = await prompt_of(bed, client, 50, 3400)
    prompt = await prompt_of(bed, client, 51, 2000)
    holding = asyncio.create_task(client.complete(bed.decode.url, hog, max_tokens=40, ignore_eos=True))

    async def held() -> bool:
        return await client.metric(bed.decode, "vllm:kv_cache_usage_perc") > 0.5

    await eventually(held, "decode to be full")
    reply = await client.complete(bed.router.url, prompt)
    await holding
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.text == plain.text
    attempt = await client.explain(bed.router, reply.request_id)
    assert loaded(attempt)["outcome"] == "loaded"
    decode = attempt["engines"]["decode"]
    assert decode["granted_s"] - decode["arrived_s"] > 0.5


async def test_three_choices(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 60, 600)
    reply = await client.complete(bed.router.url, prompt, n=3, temperature=1, top_k=1)  # vLLM refuses n > 1 at 0
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.texts == [plain.text] * 3
    attempt = await client.explain(bed.router, reply.request_id)
    assert loaded(attempt)["outcome"] == "loaded" and attempt["engines"]["decode"]["granted_blocks"] == 5


async def test_stop_strings(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 61, 500)
    whole = await client.complete(bed.plain.url, prompt, max_tokens=24)
    stop = whole.text[len(whole.text) // 2 :][:3]
    reply = await client.complete(bed.router.url, prompt, max_tokens=24, stop=[stop])
    plain = await client.complete(bed.plain.url, prompt, max_tokens=24, stop=[stop])
    assert reply.text == plain.text and reply.finish == ["stop"]


async def test_prompt_logprobs_run_on_decode_alone(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 62, 200)
    reply = await client.complete(bed.router.url, prompt, prompt_logprobs=1, max_tokens=2)
    assert reply.status == 200 and len(reply.body["choices"][0]["prompt_logprobs"]) == 200


async def test_requests_without_our_params_run_as_on_plain_vllm(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 63, 300)
    replies = [await client.complete(e.url, prompt) for e in (bed.prefill, bed.decode, bed.plain)]
    assert len({r.text for r in replies}) == 1


async def test_bad_params_are_ignored_not_fatal(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 64, 300)
    for params in ({"lmkv": 5}, {"lmkv": {"transfer_id": "x", "role": "decode", "peer": {"address": "tcp://h:1"}}}):
        reply = await client.complete(bed.decode.url, prompt, kv_transfer_params=params)
        assert reply.status == 200


async def abort(client: Client, url: str, prompt: list[int], after_s: float) -> None:
    """A client that goes away."""
    task = asyncio.create_task(client.complete(url, prompt, max_tokens=64, stream=True, ignore_eos=True))
    await asyncio.sleep(after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.3, 0.8], ids=["at once", "grant", "push", "later in the push"])
async def test_abort_before_the_first_token(bed: Bed, client: Client, after_s: float) -> None:
    """All blocks return on both engines (checked by the fixture), and the next request is answered."""
    prompt = await prompt_of(bed, client, 70 + int(after_s * 100), 2000)
    await abort(client, bed.router.url, prompt, after_s)
    await client.all_blocks_free(bed.prefill, bed.decode)
    reply = await client.complete(bed.router.url, prompt)
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.text == plain.text


async def test_abort_while_the_grant_waits_for_room(bed: Bed, client: Client) -> None:
    hog = await prompt_of(bed, client, 80, 3400)
    holding = asyncio.create_task(client.complete(bed.decode.url, hog, max_tokens=30, ignore_eos=True))

    async def held() -> bool:
        return await client.metric(bed.decode, "vllm:kv_cache_usage_perc") > 0.5

    await eventually(held, "decode to be full")
    await abort(client, bed.router.url, await prompt_of(bed, client, 81, 2000), 0.4)
    await client.all_blocks_free(bed.prefill)
    await holding


async def test_abort_during_decode(bed: Bed, client: Client) -> None:
    prompt = await prompt_of(bed, client, 82, 600)
    body = {"model": client.model, "prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
    async with client.session.post(f"{bed.router.url}/v1/completions", json=body) as response:
        await response.content.readany()
    await client.all_blocks_free(bed.prefill, bed.decode)


async def test_decode_alone_when_prefill_never_gets_the_request(bed: Bed, client: Client) -> None:
    """Decode is told of a transfer that prefill knows nothing of: the load fails by prefill's word, decode computes."""
    prompt = await prompt_of(bed, client, 90, 400)
    params = {"lmkv": {"transfer_id": "0" * 32, "role": "decode", "peer": {"address": "tcp://127.0.0.1:1"}}}
    reply = await client.complete(bed.decode.url, prompt, kv_transfer_params=params)
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.text == plain.text


async def test_prefill_gone_silent_then_back(bed: Bed, client: Client) -> None:
    """SIGSTOP in mid-push: decode gives up after the lease, keeps the old blocks, answers; then all blocks return."""
    prompt = await prompt_of(bed, client, 91, 2000)
    task = asyncio.create_task(client.complete(bed.router.url, prompt))
    await asyncio.sleep(0.5)
    _signal(bed.prefill, 19)
    try:
        reply = await asyncio.wait_for(task, 120)
    finally:
        _signal(bed.prefill, 18)
    plain = await client.complete(bed.plain.url, prompt)
    assert reply.text == plain.text
    await client.all_blocks_free(bed.prefill, bed.decode)


async def test_health_asks_the_engine_itself(bed: Bed, client: Client) -> None:
    """vLLM's own /health does not see an engine process that has stopped; ours does, and that it goes on."""

    async def answered(engine: Engine) -> tuple[int, str]:
        async with client.session.get(f"{engine.url}/health") as response:
            return response.status, await response.text()

    async def is_red() -> bool:
        status, body = await answered(bed.decode)
        return status == 503 and "did not answer Describe" in body

    async def is_well() -> bool:
        return await answered(bed.decode) == (200, "")

    for engine in (bed.prefill, bed.decode, bed.plain):
        assert await answered(engine) == (200, "")
    (core,) = [pid for pid in bed.decode.pids() if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(core, signal.SIGSTOP)
    try:
        await eventually(is_red, "/health to fail", 30)
    finally:
        os.kill(core, signal.SIGCONT)
    await eventually(is_well, "/health to be well again", 30)


def _signal(engine: Engine, number: int) -> None:
    for pid in engine.pids():
        os.kill(pid, number)
