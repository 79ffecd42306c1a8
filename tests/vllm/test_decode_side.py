"""Decode's scheduler half: what a grant says, and which reason a miss gets."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.pairing import PairState
from lmkv.ids import EngineName, Incarnation, Rank, RequestId, TransferId
from lmkv.obs.ledger import LedgerBook
from lmkv.transfer.prompt import PROMPT_DIFFERS
from lmkv.vllm.params import RequestParams
from lmkv.vllm.specs import RankReport

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, while vLLM is imported
    from lmkv.vllm.decode import DecodeSide
    from lmkv.vllm.metadata import StepMeta
    from lmkv.vllm.pooled.sources import Sources

TID = TransferId("t" * 32)
PARAMS = RequestParams(TID, "decode", "tcp://127.0.0.1:1")
WORKER = wire.WorkerCard(Rank(0), "tcp://127.0.0.1:2", "inproc", b"", "DRAM", (), 1, 64)
CARD = wire.EngineCard(EngineName("p"), Incarnation("p"), PARAMS.peer_address, "prefill", {}, {}, (16,), (WORKER,))


class Desk:
    """DecodeSide between a ready peer and an engine that has allocated blocks 1, 2, 3."""

    def __init__(self) -> None:
        self.sent: list[wire.Control] = []
        self.content: bytes | None = b"adapter"
        self.book = LedgerBook()
        endpoint = SimpleNamespace(
            pair=lambda address: (PairState.READY, "", CARD),
            pair_number=lambda address: 3,
            is_direct=lambda card: True,
            is_exact=lambda card: True,
            tell=lambda address, message: self.sent.append(message),
        )
        self.side = DecodeSide(
            ConnectorSettings(),
            Incarnation("d"),
            (16,),
            lambda tables: tables,
            endpoint,  # type: ignore[arg-type]
            SimpleNamespace(send=lambda address, message: self.sent.append(message)),  # type: ignore[arg-type]
            self.book,
            1,
            SimpleNamespace(content=lambda lora: self.content, since_reset=b""),  # type: ignore[arg-type]
        )

    def request(self, ids: list[int], lora: Any = None) -> Any:
        made = SimpleNamespace(
            request_id="r",
            num_prompt_tokens=len(ids),
            prompt_token_ids=ids,
            lora_request=lora,
            mm_features=[],
            cache_salt=None,
            prompt_embeds=None,
        )
        self.side.new_request(made, PARAMS)
        return made

    def grant(self, request: Any) -> wire.Grant:
        assert self.side.matched_tokens(request, 0) == (len(request.prompt_token_ids), True)
        self.side.allocated(request, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3],)), request.num_prompt_tokens)
        (grant,) = self.sent
        assert isinstance(grant, wire.Grant)
        return grant

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.book.to_json(TID))
        return found


def test_a_grant_says_which_prompt_it_is_for() -> None:
    ids = list(range(40))
    first, same, other = (Desk() for _ in range(3))
    digest = first.grant(first.request(ids)).prompt_digest
    assert len(digest) == 16 and same.grant(same.request(ids)).prompt_digest == digest
    assert other.grant(other.request([*ids[:-1], 7])).prompt_digest != digest


def test_another_prompt_is_a_miss_that_says_so() -> None:
    desk = Desk()
    desk.grant(desk.request(list(range(40))))
    desk.side.fill(StepMeta())
    desk.side.reported(RankReport(TID, RequestId("r"), "failed", True, PROMPT_DIFFERS))
    assert desk.book.counts()["miss:prompt"] == 1
    assert desk.facts()["miss"] == "prompt: the engines tokenized it differently"


def test_without_the_adapters_content_nothing_is_granted() -> None:
    desk = Desk()
    desk.content = None
    request = desk.request(list(range(40)), lora=SimpleNamespace(lora_name="a"))
    assert desk.side.matched_tokens(request, 0) == (0, False)
    desk.side.allocated(request, None, 0)
    assert [type(message) for message in desk.sent] == [wire.NotNeeded]
    assert desk.book.counts()["miss:prompt"] == 1 and "adapter" in desk.facts()["miss"]


def test_what_prefill_has_given_up_is_not_asked_for() -> None:
    """Also without a pool: a grant that comes when prefill has forgotten the transfer would wait for its deadline."""
    desk = Desk()
    request = desk.request(list(range(40)))
    desk.side.parked(TID)
    assert Sources(desk.side, None).matched_tokens(request, 0, handed_over=True) == (0, False)
    assert desk.book.counts()["miss:parked"] == 1
    assert desk.sent == []


def test_slots_in_quarantine_are_counted_and_given_back() -> None:
    desk = Desk()
    desk.grant(desk.request(list(range(40))))
    desk.side.fill(StepMeta())
    desk.side.reported(RankReport(TID, RequestId("r"), "failed", True, "peer lost", slots=5))
    assert desk.book.counts()["quarantined_slots"] == 5
    desk.side.reported(RankReport(TID, RequestId("r"), "drained", True, "", slots=-5))
    assert desk.book.counts()["quarantined_slots"] == 0
