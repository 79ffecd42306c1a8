"""Requests whose KV was loaded are computed again afterwards: what is sent, compared, counted, and left alone."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from lmkv.router.bodies import Kind, parse, probe_body
from lmkv.router.compare import Found, UnreadableError, difference, loaded_of, read_probe, tolerance_for

from .conftest import Build, System
from .fakes import Behaviour, Seen, answers, drop, hang, like_vllm, until
from .test_streaming import read_metrics

RIGHT = {"token_id:5": -0.1, "token_id:6": -2.5, "token_id:7": -4.0}
WRONG = {"token_id:9": -0.2, "token_id:6": -2.0, "token_id:5": -6.0}
LOADED = {"outcome": "loaded", "first_token": 128, "prompt_tokens": 700, "peer": "00000000000000p0", "mode": "direct"}
POOL = {
    "tokens": [0, 640],
    "namespace": "ab" * 16,
    "nodes": {"node-1": {"first_chunk": 0, "last_chunk": 4, "first_key": "aa", "last_key": "ee", "pages": 5}},
}


@dataclass
class ProbedEngine:
    """How a fake decode engine answers probes; everything else is answered as vLLM does.

    `loaded` is what the KV that was loaded leads to, `computed` what computing does: unlike ones are the fault.
    """

    loaded: dict[str, float] = field(default_factory=lambda: dict(RIGHT))
    computed: dict[str, float] = field(default_factory=lambda: dict(RIGHT))
    cached_tokens: int = 640
    prompts: tuple[str, str] = ("same", "same")
    dtype: str = "torch.bfloat16"
    instead: Behaviour | None = None
    """Answers probes in its own way."""
    probes: list[Seen] = field(default_factory=list)

    async def __call__(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        params = (seen.body.get("kv_transfer_params") or {}).get("lmkv") or {}
        if not params.get("probe"):
            return await like_vllm(request, seen)
        self.probes.append(seen)
        if self.instead is not None:
            return await self.instead(request, seen)
        salted = len(self.probes) % 2 == 0
        return web.json_response(self.answer(seen, salted))

    def answer(self, seen: Seen, salted: bool) -> dict[str, Any]:
        likely = self.computed if salted else self.loaded
        token = max(likely, key=lambda name: likely[name])
        if "chat" in seen.path:
            top = [{"token": name, "logprob": value, "bytes": None} for name, value in likely.items()]
            logprobs: dict[str, Any] = {"content": [{"token": token, "logprob": likely[token], "top_logprobs": top}]}
        else:
            logprobs = {"tokens": [token], "token_logprobs": [likely[token]], "top_logprobs": [likely]}
        probe = {
            "cached_tokens": 0 if salted else self.cached_tokens,
            "prompt": self.prompts[salted],
            "dtype": self.dtype,
            "kv_dtype": "auto",
        }
        return {
            "choices": [{"index": 0, "logprobs": logprobs, "finish_reason": "length"}],
            "kv_transfer_params": {"lmkv": {"probe": probe}},
        }


Ask = Callable[..., Awaitable[str]]


async def shadowed(build: Build, engine: ProbedEngine, ledger: dict[str, Any] | None = None, **settings: Any) -> System:
    """A router that compares every request; decode's ledger of any transfer is `ledger`."""
    s = await build(**{"shadow_share": 1.0, **settings})
    s.decode[0].behaviour = engine
    s.decode[0].control.ledgers = AnyLedger(json.dumps(LOADED if ledger is None else ledger).encode())
    return s


class AnyLedger(dict[str, bytes]):
    """The same ledger for every id."""

    def __init__(self, ledger: bytes) -> None:
        super().__init__()
        self.ledger = ledger

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, self.ledger)


async def ask(s: System, path: str = "/v1/completions", request_id: str = "r1", **members: Any) -> None:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    body = {"model": "m", **prompt, **members}
    async with s.client.post(s.url + path, json=body, headers={"X-Request-Id": request_id}) as reply:
        await reply.read()
        assert reply.status == 200


async def result(s: System, request_id: str = "r1") -> dict[str, Any]:
    """The ledger's entry, once the comparison has ended."""

    def told() -> Any:
        entry = s.router.ledger.find(request_id)
        return entry is not None and entry.shadow is not None and entry.shadow["result"] != "running"

    await until(told, f"the comparison to end: {s.router.ledger.find(request_id)}")
    entry = s.router.ledger.find(request_id)
    assert entry is not None and entry.shadow is not None
    metrics = await read_metrics(s)
    assert metrics[f'lmkv_router_shadow_total{{result="{entry.shadow["result"]}"}}'] >= 1
    return entry.shadow


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_equal_answers_are_counted(build: Build, path: str, stream: bool) -> None:
    engine = ProbedEngine(computed={"token_id:5": -0.15, "token_id:6": -2.4, "token_id:7": -4.0})
    s = await shadowed(build, engine)
    await ask(s, path, stream=stream)
    told = await result(s)
    assert told["result"] == "equal" and told["difference"] == pytest.approx(0.1) and told["tolerance"] == 1.0
    assert told["loaded_tokens"] == [128, 700] and told["compared_tokens"] == 640
    assert len(engine.probes) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_wrong_kv_raises_the_alarm(build: Build, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """One error line names request, transfer, decode engine, and the prefill engine that the KV came from."""
    s = await shadowed(build, ProbedEngine(loaded=WRONG))
    s.prefill[0].control.ledgers = AnyLedger(json.dumps({"pool": POOL}).encode())
    await ask(s, path)
    told = await result(s)
    assert told["result"] == "different" and told["difference"] == pytest.approx(5.9)
    assert told["with_loaded_kv"][0] == ["token_id:9", -0.2] and told["computed_again"][0] == ["token_id:5", -0.1]
    prefill, decode = s.prefill[0].url[7:], s.decode[0].url[7:]
    assert told["sources"]["prefill"]["engine"] == prefill
    assert told["sources"]["prefill"]["incarnation"] == LOADED["peer"]
    assert told["sources"]["prefill"]["pool"] == POOL, "what prefill itself had loaded from the pool"
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    transfer_id = s.decode[0].seen[0].lmkv["transfer_id"]
    for word in ("r1", transfer_id, decode, prefill, LOADED["peer"], "token_id:9", "token_id:5", POOL["namespace"]):
        assert word in line, word
    status, explained = await s.get("/explain/r1")
    assert status == 200 and explained["shadow"] == told


async def test_pages_of_the_pool_are_named(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    """A request of one engine alone gets a ledger of its own, in which the engine notes what it has loaded."""
    s = await shadowed(build, ProbedEngine(loaded=WRONG), {"pool": POOL}, prefill=0)
    await ask(s)
    told = await result(s)
    assert told["result"] == "different" and told["sources"] == {"pool": POOL}
    assert told["loaded_tokens"] == [0, 640]
    ledger_id = s.decode[0].seen[0].lmkv["ledger"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert ledger_id in line and "node-1" in line and POOL["nodes"]["node-1"]["last_key"] in line  # type: ignore[index]
    _, explained = await s.get("/explain/r1")
    assert explained["attempts"][0]["engines"] == {"decode": {"pool": POOL}}


async def test_what_a_probe_asks(build: Build) -> None:
    """The client's prompt with everything that shapes it; nothing of how it samples or wants to be answered."""
    engine = ProbedEngine()
    s = await shadowed(build, engine)
    shaping = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"today": "now"},
        "add_generation_prompt": True,
        "mm_processor_kwargs": {"x": 1},
        "reasoning_effort": "low",
    }
    dropped = {
        "n": 3,
        "temperature": 0.9,
        "top_p": 0.1,
        "seed": 1,
        "logit_bias": {"5": -100},
        "allowed_token_ids": [1],
        "max_completion_tokens": 50,
        "min_tokens": 9,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "me",
        "priority": 1,
        "guided_json": {},
        "presence_penalty": 1.0,
    }
    params = {"kv_transfer_params": {"theirs": 1}, "cache_salt": "alice"}
    await ask(s, "/v1/chat/completions", **shaping, **dropped, **params)
    assert (await result(s))["result"] == "equal"
    cached, computed = (seen.body for seen in engine.probes)
    for body in (cached, computed):
        assert {name: body[name] for name in shaping} == shaping
        assert body["messages"] == [{"role": "user", "content": "hi"}]
        assert not (dropped.keys() - {"temperature", "stream"}) & body.keys()
        assert (body["max_tokens"], body["temperature"], body["stream"]) == (1, 0, False)
        assert (body["logprobs"], body["top_logprobs"], body["return_tokens_as_token_ids"]) == (True, 5, True)
        assert body["kv_transfer_params"] == {"theirs": 1, "lmkv": {"probe": True, "approximate": True}}
    assert cached["cache_salt"] == "alice" and len(computed["cache_salt"]) == 32
    ids = {seen.headers["X-Request-Id"] for seen in engine.probes}
    assert len(ids) == 2 and "r1" not in ids


def test_a_probe_of_completions() -> None:
    body = json.loads(probe_body(Kind.COMPLETION, parse(b'{"prompt": [1, 2], "logprobs": 1, "echo": true}'), "salt"))
    assert body["logprobs"] == 5 and body["prompt"] == [1, 2] and body["cache_salt"] == "salt"
    assert "top_logprobs" not in body and "echo" not in body


@pytest.mark.parametrize(
    ("engine", "ledger", "members", "why"),
    [
        (ProbedEngine(), {"outcome": "failed", "miss": "load_failed: x"}, {}, "not_loaded"),
        (ProbedEngine(), {"not_needed": "decode has the prompt"}, {}, "not_loaded"),
        (ProbedEngine(), {"outcome": "loaded"}, {}, "untold"),
        (ProbedEngine(cached_tokens=128), None, {}, "uncached"),
        (ProbedEngine(cached_tokens=0), None, {}, "uncached"),
        (ProbedEngine(prompts=("monday", "tuesday"), loaded=WRONG), None, {}, "prompt_changed"),
        (ProbedEngine(instead=answers(400, {"error": {"message": "max_logprobs is 0"}})), None, {}, "refused"),
        (ProbedEngine(instead=answers(500, {"error": {}})), None, {}, "refused"),
        (ProbedEngine(instead=answers(200, {"choices": []})), None, {}, "untold"),
        (ProbedEngine(instead=drop), None, {}, "failed"),
        (ProbedEngine(instead=hang), None, {}, "deadline"),
        (ProbedEngine(), None, {"prompt": ["a", "b"]}, "unfit"),
    ],
)  # fmt: skip
async def test_what_is_skipped(
    build: Build, engine: ProbedEngine, ledger: dict[str, Any] | None, members: dict[str, Any], why: str
) -> None:
    """Counted by its reason; the engine stays up, and the client has had its answer all the same."""
    s = await shadowed(build, engine, ledger, shadow_timeout_s=0.3 if why == "deadline" else 20.0)
    await ask(s, **members)
    told = await result(s)
    assert told["result"] == f"skipped_{why}" and told["why"]
    assert s.router.engines.decode[0].healthy
    await ask(s, request_id="r2", **members)
    assert (await result(s, "r2"))["result"] == f"skipped_{why}"


async def test_an_engine_that_does_not_explain(build: Build) -> None:
    engine = ProbedEngine()
    s = await shadowed(build, engine, explain_timeout_s=0.1)
    s.decode[0].control.silent = True
    await ask(s)
    told = await result(s)
    assert told["result"] == "skipped_failed" and "LMKV-N701" in told["why"] and not engine.probes


async def test_by_default_nothing_is_compared(build: Build) -> None:
    engine = ProbedEngine(loaded=WRONG)
    s = await build()
    s.decode[0].behaviour = engine
    await ask(s)
    await ask(s, prompt=["a", "b"])
    assert not s.router.shadows.running and not engine.probes
    assert "kv_transfer_params" not in s.decode[0].seen[1].body, "a body of one engine alone passes as it is"
    entry = s.router.ledger.find("r1")
    assert entry is not None and entry.shadow is None


async def test_a_share_is_drawn(build: Build) -> None:
    s = await shadowed(build, ProbedEngine(), shadow_share=0.25)
    s.router.shadows._chance.seed(4)
    drawn = sum(s.router.shadows.draw() for _ in range(4000))
    assert 900 < drawn < 1100


async def test_failed_answers_are_not_compared(build: Build) -> None:
    engine = ProbedEngine()
    s = await shadowed(build, engine)
    s.decode[0].script = [answers(400, {"error": {}})]
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "x"}) as reply:
        assert reply.status == 400
    await ask(s, request_id="r2")
    assert (await result(s, "r2"))["result"] == "equal" and len(engine.probes) == 2


def holds(gate: asyncio.Event, engine: ProbedEngine) -> Behaviour:
    async def behave(request: web.Request, seen: Seen) -> web.StreamResponse:
        await gate.wait()
        return web.json_response(engine.answer(seen, len(engine.probes) % 2 == 0))

    return behave


async def test_one_at_a_time(build: Build) -> None:
    """What is drawn while a comparison runs is skipped; a client is served meanwhile."""
    gate, engine = asyncio.Event(), ProbedEngine()
    engine.instead = holds(gate, engine)
    s = await shadowed(build, engine)
    await ask(s)
    await until(lambda: engine.probes, "the first probe")
    await ask(s, request_id="r2")
    assert (await result(s, "r2"))["result"] == "skipped_limit"
    gate.set()
    assert (await result(s))["result"] == "equal"


async def test_a_busy_engine_is_left_alone(build: Build) -> None:
    """Before the first probe, and before the second, which costs a whole prompt."""
    gate, engine = asyncio.Event(), ProbedEngine()
    engine.instead = holds(gate, engine)
    s = await shadowed(build, engine, shadow_busy_requests=2)
    load = s.router.engines.decode[0]
    load.requests += 2
    await ask(s)
    assert (await result(s))["result"] == "skipped_busy" and not engine.probes
    load.requests -= 2
    await ask(s, request_id="r2")
    await until(lambda: engine.probes, "the first probe")
    load.requests += 2
    gate.set()
    assert (await result(s, "r2"))["result"] == "skipped_busy" and len(engine.probes) == 1
    load.requests -= 2


async def test_stopping_cancels(build: Build) -> None:
    """A router that drains does not wait for comparisons, and its probes are closed."""
    engine = ProbedEngine(instead=hang)
    s = await shadowed(build, engine)
    await ask(s)
    await until(lambda: engine.probes, "the first probe")
    started_s = time.monotonic()
    await s.router.drain(5.0, 1.0)
    assert time.monotonic() - started_s < 2.0 and not s.router.shadows.running
    assert (await result(s))["result"] == "skipped_stopped"
    await until(lambda: engine.probes[0].aborted, "the probe's connection to be closed")


async def test_keys_go_to_the_engine(build: Build) -> None:
    engine = ProbedEngine()
    s = await shadowed(build, engine, api_key="router", engine_api_key="engine")
    body = {"prompt": "hi"}
    headers = {"Authorization": "Bearer router", "X-Request-Id": "r1"}
    async with s.client.post(s.url + "/v1/completions", json=body, headers=headers) as reply:
        await reply.read()
    assert (await result(s))["result"] == "equal"
    assert {seen.headers["Authorization"] for seen in engine.probes} == {"Bearer engine"}


async def test_a_tolerance_of_ones_own(build: Build) -> None:
    s = await shadowed(build, ProbedEngine(computed=RIGHT | {"token_id:6": -2.4}), shadow_tolerance=0.05)
    await ask(s)
    assert (await result(s))["result"] == "different"


# --- judging ---


def found(**logprobs: float) -> Found:
    return Found("a", logprobs, 0, "", "float32", "auto")


def test_the_difference_that_is_proven() -> None:
    assert difference(found(a=-0.1, b=-2.0), found(a=-0.3, b=-1.9)) == pytest.approx(0.2)
    # b is not among the likeliest of the other, so it has at most c's logprob there, and the other way round.
    assert difference(found(a=-0.1, b=-3.0), found(a=-0.1, c=-3.2)) == pytest.approx(0.2)
    assert difference(found(a=-0.1, b=-2.0), found(c=-0.1, b=-2.0)) == pytest.approx(1.9)
    # Two tokens that are equally likely may change places.
    assert difference(found(a=-0.70, b=-0.71), found(a=-0.71, b=-0.70)) == pytest.approx(0.01)


def test_tolerances() -> None:
    assert tolerance_for("torch.float32", "auto") < tolerance_for("float16", "auto") < tolerance_for("bfloat16", "auto")
    assert tolerance_for("torch.bfloat16", "fp8_e4m3") == tolerance_for("something", "auto") == 2.0
    assert tolerance_for("torch.float32", "bfloat16") == tolerance_for("torch.bfloat16", "auto")


def test_ledgers_that_cannot_be_read() -> None:
    assert loaded_of({}) is None
    for bad in ({"outcome": "loaded", "first_token": None, "prompt_tokens": 1}, {"pool": {"tokens": []}}, {"pool": 3}):
        with pytest.raises(UnreadableError, match="ledger"):
            loaded_of(bad)
    both = loaded_of(LOADED | {"pool": POOL})
    assert both is not None and (both.lo, both.hi) == (0, 700)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": [{"logprobs": null}]}', b'{"choices": 3}'])
@pytest.mark.parametrize("kind", list(Kind))
def test_probes_that_cannot_be_read(kind: Kind, body: bytes) -> None:
    with pytest.raises(UnreadableError):
        read_probe(kind, body)
