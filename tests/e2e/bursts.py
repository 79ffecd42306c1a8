"""Bursts of simultaneous requests that share a fresh prefix, and what plain vLLM answers to the same prompts.

Shared by test_bursts.py and scripts/soak.py. A burst's prompts begin with the same natural text, which nobody has
asked for before, and differ in their endings; some of its clients go away in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from .bed import PROSE, Client, Engine, Node, Router, eventually, stopping

PREFIX_CHARACTERS = 4000
OPENERS, OPENER_CHARACTERS = 3, 7000
REQUEST_DEADLINE_S = 300.0
TIE_LOGPROB = 1e-3
"""Two tokens whose logprobs differ by less than this are equally likely in float32: rounding that depends on the batch
decides between them, with any engine."""

COMMON = ("--dtype", "float32", "--max-model-len", "2048")
SMALL_BLOCKS = ("--block-size", "32", "--num-gpu-blocks-override", "440")
LARGE_BLOCKS = ("--block-size", "128", "--num-gpu-blocks-override", "110")
"""14,080 tokens: a burst of six fits, one of 24 with longer answers preempts."""
FEW_BLOCKS = ("--block-size", "32", "--num-gpu-blocks-override", "140")
"""A third of it: requests that compute or load on one engine share the blocks of their prefix, and 21 with the longest
answers then have 157 blocks."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One burst. `aborted`: so many clients more send the same kind of request and go away before its end.

    Requests with other long prompts go ahead of each burst: while the engine computes those, the burst queues, and is
    then scheduled in one step.
    """

    requests: int = 6
    aborted: int = 2
    max_tokens: int = 12
    tight: bool = False
    """It is more than the engines' caches hold at once: running requests are preempted."""


PLAIN_SHAPE = Shape()
TIGHT_SHAPE = Shape(requests=24, aborted=4, max_tokens=130, tight=True)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of sharing KV. Requests go to `urls` in turn, those of a burst that preempts to `tight_urls`. `generate`
    are the engines that compute answers, the others compute prompts only."""

    name: str
    urls: tuple[str, ...]
    tight_urls: tuple[str, ...]
    engines: tuple[Engine, ...]
    generate: tuple[Engine, ...]
    router: Router | None = None


@dataclass(slots=True)
class Judged:
    """One answer beside plain vLLM's. `verdict` is equal, tie or wrong."""

    prompt: str
    ours: str
    plain: str
    verdict: str
    request_id: str = ""
    url: str = ""
    ledger: Any = None


@dataclass(slots=True)
class Tally:
    """All answers of one mode."""

    judged: list[Judged] = field(default_factory=list)
    aborted: int = 0
    preemptions: int = 0
    seconds: float = 0.0

    def count(self, verdict: str) -> int:
        return sum(one.verdict == verdict for one in self.judged)

    @property
    def wrong(self) -> list[Judged]:
        return [one for one in self.judged if one.verdict == "wrong"]

    def add(self, other: Tally) -> None:
        self.judged += other.judged
        self.aborted += other.aborted
        self.preemptions += other.preemptions
        self.seconds += other.seconds


# --- engines ---


@contextlib.contextmanager
def plain_engine(run: Path, model: str) -> Iterator[Engine]:
    """vLLM without a connector, with room for everything."""
    engine = Engine.start("plain", "plain", run, *COMMON, model=model)
    with stopping(engine):
        engine.wait_ready()
        yield engine


@contextlib.contextmanager
def pushing_engines(run: Path, model: str) -> Iterator[dict[str, Mode]]:
    """A prefill engine with two decode engines, of its own block size ("direct") and another ("landing"); no pool."""
    prefill = Engine.start("prefill", "prefill", run, *COMMON, *SMALL_BLOCKS, model=model, core="0")
    direct = Engine.start("direct", "decode", run, *COMMON, *SMALL_BLOCKS, model=model, core="1")
    landing = Engine.start("landing", "decode", run, *COMMON, *LARGE_BLOCKS, model=model, core="1")
    with stopping(prefill, direct, landing):
        for engine in (prefill, direct, landing):
            engine.wait_ready()
        routers = {
            "direct": Router.start("router-direct", run, [prefill], [direct]),
            "landing": Router.start("router-landing", run, [prefill], [landing]),
        }
        with stopping(*routers.values()):
            modes = {}
            for (name, router), decode in zip(routers.items(), (direct, landing), strict=True):
                router.wait_ready()
                modes[name] = Mode(name, (router.url,), (router.url,), (prefill, decode), (decode,), router)
            yield modes


@contextlib.contextmanager
def pooling_engines(
    run: Path, model: str, prefill_args: Sequence[str] = (), decode_args: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Mode], Node]]:
    """A prefill and a decode engine on one pool node: asked each for itself ("pool"), and as a pair ("pool-pd")."""
    node = Node.start("node", run)
    node.wait_ready()
    env = {"LMKV_LOOKUP_MS": "200"}  # engines, node and test share few cores
    common = (*COMMON, "--pool", node.address)
    prefill_args, decode_args = (*common, *FEW_BLOCKS, *prefill_args), (*common, *SMALL_BLOCKS, *decode_args)
    prefill = Engine.start("pool-prefill", "prefill", run, *prefill_args, model=model, core="0", env=env)
    decode = Engine.start("pool-decode", "decode", run, *decode_args, model=model, core="1", env=env)
    with stopping(prefill, decode, node):
        prefill.wait_ready()
        decode.wait_ready()
        router = Router.start("router-pool", run, [prefill], [decode])
        with stopping(router):
            router.wait_ready()
            both = (prefill, decode)
            yield (
                {
                    "pool": Mode("pool", (prefill.url, decode.url), (decode.url, *7 * (prefill.url,)), both, both),
                    "pool-pd": Mode("pool-pd", (router.url,), (router.url,), both, (decode,), router),
                },
                node,
            )


@contextlib.asynccontextmanager
async def client_of(model: str) -> AsyncIterator[Client]:
    """A client without limits, each of whose requests has a connection of its own: one that is kept open may be closed
    by an engine just as the next burst begins."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=REQUEST_DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield Client(session, model)


# --- prompts ---


def prompts_of(title: str, requests: int) -> list[str]:
    """Natural texts with one beginning, which `title` makes new, and endings of different lengths."""
    sentences = [sentence.strip() + "." for sentence in PROSE.split(".") if sentence.strip()]
    order = random.Random(title)
    order.shuffle(sentences)
    prefix = f"{title}. " + " ".join(sentences)
    prefix = prefix[:PREFIX_CHARACTERS]
    rest = [sentence for sentence in sentences if sentence not in prefix] or sentences
    return [
        f"{prefix} Reader {i} adds: {' '.join(order.choices(rest, k=1 + i % 3))} Therefore" for i in range(requests)
    ]


def opener_of(title: str) -> str:
    """A long text of its own, for the request that goes ahead of a burst."""
    order = random.Random(f"opener of {title}")
    sentences = [sentence.strip() for sentence in PROSE.split(".") if sentence.strip()]
    order.shuffle(sentences)
    return f"Before {title}: " + ". ".join(sentences)[:OPENER_CHARACTERS]


# --- one burst ---


async def burst(client: Client, mode: Mode, plain: Engine, title: str, shape: Shape) -> Tally:
    """Ask `mode` and plain vLLM for the same prompts, each time all at once, and judge the answers."""
    started_s = time.monotonic()
    before = [await client.metric(engine, "vllm:num_preemptions_total") for engine in mode.generate]
    prompts = prompts_of(title, shape.requests + shape.aborted)
    urls = mode.tight_urls if shape.tight else mode.urls
    openers = [
        asyncio.create_task(_ask(client, urls[i % len(urls)], opener_of(f"{title}, {i}"), PLAIN_SHAPE))
        for i in range(OPENERS)
    ]
    ours = await _ask_all(client, urls, prompts, shape, random.Random(title))
    await asyncio.gather(*openers)
    plains = await asyncio.gather(*(_ask(client, plain.url, prompt, shape) for prompt in prompts[: shape.requests]))
    tally = Tally(aborted=shape.aborted)
    for i, (our, expected) in enumerate(zip(ours, plains, strict=True)):
        verdict = await _judge(client, plain, our, expected)
        url = urls[i % len(urls)]
        judged = Judged(prompts[i], our.text, expected.text, verdict, our.request_id, url)
        if verdict == "wrong" and mode.router is not None:
            judged.ledger = await explained(client, mode.router, our.request_id)
        tally.judged.append(judged)
    after = [await client.metric(engine, "vllm:num_preemptions_total") for engine in mode.generate]
    tally.preemptions = int(sum(after) - sum(before))
    tally.seconds = time.monotonic() - started_s
    return tally


async def bursts(client: Client, mode: Mode, plain: Engine, title: str, shape: Shape, requests: int) -> Tally:
    """Bursts one after the other, until `requests` answers have been judged."""
    tally = Tally()
    number = 0
    while len(tally.judged) < requests:
        number += 1
        tally.add(await burst(client, mode, plain, f"{title}, letter {number}", shape))
    return tally


async def explained(client: Client, router: Router, request_id: str) -> Any:
    """The router's ledger of a request, as it is now."""
    async with client.session.get(f"{router.url}/explain/{request_id}") as response:
        return await response.json()


async def idle(client: Client, mode: Mode) -> None:
    """Wait until the engines have no request, whatever has become of those whose clients went away."""
    for engine in mode.engines:

        async def nothing_runs(engine: Engine = engine) -> bool:
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            return not any([await client.metric(engine, name) for name in names])

        await eventually(nothing_runs, f"{engine.proc.name} to have nothing to do")


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    prompt_ids: list[int]
    ids: list[int]
    request_id: str


async def _ask_all(
    client: Client, urls: tuple[str, ...], prompts: list[str], shape: Shape, chance: random.Random
) -> list[_Answer]:
    """All prompts at once; the last `shape.aborted` of them by clients that do not wait for the end. These are spread
    among the others."""
    tasks = {
        i: asyncio.create_task(_ask(client, urls[i % len(urls)], prompts[i], shape))
        for i in chance.sample(range(len(prompts)), len(prompts))
    }
    leaving = [tasks[i] for i in range(shape.requests, len(prompts))]
    leavers = [asyncio.create_task(_leave(task, chance.uniform(0.0, 1.0))) for task in leaving]
    try:
        return list(await asyncio.gather(*(tasks[i] for i in range(shape.requests))))
    finally:
        await asyncio.gather(*leavers)


async def _leave(task: asyncio.Task[_Answer], after_s: float) -> None:
    await asyncio.wait([task], timeout=after_s)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _ask(client: Client, url: str, prompt: str, shape: Shape) -> _Answer:
    reply = await client.complete(url, prompt, max_tokens=shape.max_tokens, ignore_eos=True, return_token_ids=True)
    assert reply.status == 200, f"{url} answered {reply.status}: {reply.body}"
    (choice,) = reply.body["choices"]
    return _Answer(choice["text"], choice["prompt_token_ids"], choice["token_ids"], reply.request_id)


async def _judge(client: Client, plain: Engine, ours: _Answer, expected: _Answer) -> str:
    if ours.ids == expected.ids:
        return "equal"
    at = next((i for i, (a, b) in enumerate(zip(ours.ids, expected.ids, strict=False)) if a != b), None)
    if at is None:
        return "wrong"
    return "tie" if await _is_tie(client, plain, [*expected.prompt_ids, *expected.ids[:at]], ours.ids[at]) else "wrong"


async def _is_tie(client: Client, plain: Engine, ids: list[int], other: int) -> bool:
    """Plain vLLM finds the token `other` as likely as its own next one."""
    reply = await client.complete(plain.url, ids, max_tokens=1, logprobs=5, return_tokens_as_token_ids=True)
    likely: dict[str, float] = reply.body["choices"][0]["logprobs"]["top_logprobs"][0]
    name = f"token_id:{other}"
    return name in likely and max(likely.values()) - likely[name] < TIE_LOGPROB
