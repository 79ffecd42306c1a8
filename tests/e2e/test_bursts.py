"""Simultaneous requests with a fresh common prefix: every answer is plain vLLM's, however KV is shared."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import pytest

from .bed import Client, Engine
from .bursts import (
    PLAIN_SHAPE,
    TIGHT_SHAPE,
    Mode,
    Tally,
    bursts,
    client_of,
    idle,
    plain_engine,
    pooling_engines,
    pushing_engines,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

TINY = "tiny-llama"
REQUESTS = 24


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with plain_engine(tmp_path_factory.mktemp("plain"), TINY) as engine:
        yield engine


@pytest.fixture(scope="module", params=["direct and landing", "pool and pool-pd"])
def modes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Mode]]:
    """Engines that are up together, and the two ways of sharing KV among them."""
    run = tmp_path_factory.mktemp("bursts")
    if request.param == "direct and landing":
        with pushing_engines(run, TINY) as found:
            yield list(found.values())
    else:
        with pooling_engines(run, TINY) as (found, _):
            yield list(found.values())


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def mode(request: pytest.FixtureRequest, modes: list[Mode]) -> Mode:
    which: int = request.param
    return modes[which]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with client_of(TINY) as client:
        yield client


def judge(tally: Tally) -> None:
    """Fails with the first wrong answer and its ledger."""
    assert len(tally.judged) >= REQUESTS
    wrong = tally.wrong
    if wrong:
        one = wrong[0]
        pytest.fail(
            f"{len(wrong)} of {len(tally.judged)} answers are wrong; the first, from {one.url}: {one.ours!r} instead "
            f"of {one.plain!r}, to a prompt that ends with {one.prompt[-200:]!r}; ledger {json.dumps(one.ledger)}"
        )


async def test_answers_are_plain_vllms(mode: Mode, plain: Engine, client: Client) -> None:
    judge(await bursts(client, mode, plain, f"The burst of {mode.name}", PLAIN_SHAPE, REQUESTS))
    await idle(client, mode)


async def test_answers_with_a_cache_that_preempts(mode: Mode, plain: Engine, client: Client) -> None:
    tally = await bursts(client, mode, plain, f"The crowd of {mode.name}", TIGHT_SHAPE, REQUESTS)
    judge(tally)
    assert tally.preemptions > 0, "the caches were not small enough"
    await idle(client, mode)
