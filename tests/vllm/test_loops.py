"""Transfers between two worker loops with real memory: what arrives, and what must not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmkv.ids import TransferId
from lmkv.transfer.events import PROMPT_FAULT, Prompt

from .loop_bed import PROMPT, Pair

T = TransferId("t" * 32)
FROM, INTO = (3, 7, 1, 10), (2, 9, 5, 4)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_the_prompt_arrives(pair: Pair) -> None:
    pair.expect(T, INTO)
    pair.grant(T, INTO)
    pair.offer(T)
    pair.compute(T, FROM)
    assert pair.report(T).outcome == "loaded"
    assert torch.equal(pair.decode.kv[:, list(INTO)], pair.prefill.kv[:, list(FROM)])
    assert pair.ledger(T)["outcome"] == "sent"


@pytest.mark.parametrize("grant_first", [False, True])
@pytest.mark.parametrize(
    "other",
    [Prompt(b"q" * 16, PROMPT.tokens), Prompt(PROMPT.digest, PROMPT.tokens - 1), Prompt(b"", PROMPT.tokens)],
    ids=["digest", "length", "unknown"],
)
def test_kv_of_another_prompt_never_arrives(pair: Pair, other: Prompt, grant_first: bool) -> None:
    before = pair.decode.kv.clone()
    pair.expect(T, INTO)
    if grant_first:
        pair.grant(T, INTO)
    pair.offer(T, other)
    pair.compute(T, FROM)
    if not grant_first:
        pair.grant(T, INTO)
    report = pair.report(T)
    assert (report.outcome, report.drained) == ("failed", True) and report.reason.startswith(PROMPT_FAULT)
    ledger = pair.ledger(T)
    assert (ledger["outcome"], ledger["writes"]) == ("failed", 0) and ledger["reason"].startswith(PROMPT_FAULT)
    assert torch.equal(pair.decode.kv, before), "nothing was written"
