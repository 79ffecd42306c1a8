"""The scheduler's half of the pool, asked as vLLM asks it, on a real node."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv import poolwire as pw
from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.hashing import Chain
from lmkv.ids import Incarnation, Rank
from lmkv.obs.ledger import LedgerBook
from lmkv.pool.node import PoolNode
from lmkv.vllm.pooled.adapters import Adapters
from lmkv.vllm.pooled.books import PoolBooks
from lmkv.vllm.pooled.side import PoolSide
from lmkv.vllm.specs import LoadReport

from .pool_bed import CHUNK, MANIFEST, RankBed, running_node

BLOCK = 32
IDS = [5, 2, 9, 1, 7, 3, 11, 4]


def make_request(name: str, tokens: int, first: int = 0, **more: Any) -> Any:
    ids = [first + 1, *range(tokens - 1)]
    given = {
        "request_id": name,
        "all_token_ids": ids,
        "num_tokens": tokens,
        "num_preemptions": 0,
        "cache_salt": None,
        "lora_request": None,
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_token_ids": ids,
        "pooling_params": None,
        "resumable": False,
        "skip_reading_prefix_cache": False,
        "kv_transfer_params": None,
    }
    return SimpleNamespace(**{**given, **more})


class SideBed:
    """A PoolSide of one rank that uses `node`; told names the namespaces that workers were told."""

    def __init__(self, node: PoolNode, bed: RankBed, **settings: Any) -> None:
        own = ConnectorSettings(
            pool=(node.card.address,), chunk_tokens=CHUNK, **{"lookup_ms": 300.0, "min_pool_tokens": 16, **settings}
        )
        self.book = LedgerBook()
        self.adapters = Adapters()
        self.side = PoolSide(own, (BLOCK,), lambda tables: tables, self.book, 1, self.adapters)
        self.told: list[str] = []
        self.bed = bed
        self.side.named(Incarnation("00000000000000cc"), MANIFEST, self.told.append)
        self.side.nodes(wire.PoolNodes(Rank(0), ((node.card.incarnation, True),)))

    def attach(self) -> None:
        """Until lookups reach the node."""
        until_s = time.monotonic() + 20
        number = 0
        while self.count("lookup:miss") == 0:
            number += 1
            request = make_request(f"attach{number}", 2 * CHUNK, 50_000 + number)
            self.side.new_request(request, False)
            self.found(request)
            self.side.finished(request)
            assert time.monotonic() < until_s

    def found(self, request: Any, computed: int = 0) -> int:
        """As vLLM asks: again and again until it is known."""
        until_s = time.monotonic() + 10
        while (found := self.side.found(request, computed)) is None:
            assert time.monotonic() < until_s
        return found

    def count(self, name: str) -> int:
        return self.book.counts().get(f"pool:{name}", 0)

    def step(self, request: Any, before: int, tokens: int, preempted: tuple[str, ...] = ()) -> Any:
        """One step that computes `tokens` of the request (0: none)."""
        meta = SimpleNamespace(loads=[], stores=[], ended=[], overwritten=[])
        state = SimpleNamespace(get_block_ids=lambda request_id: ([*range(1, 40)],))
        scheduled = [request.request_id] if tokens else []
        output = SimpleNamespace(
            preempted_req_ids=preempted,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(req_ids=scheduled, num_computed_tokens=[before] if tokens else []),
            num_scheduled_tokens={request.request_id: tokens} if tokens else {},
            total_num_scheduled_tokens=tokens,
            kv_connector_block_state=state,
        )
        self.side.fill(meta, output)
        return meta

    def blocks(self) -> Any:
        return SimpleNamespace(get_block_ids=lambda: ([*range(1, 40)],))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[SideBed]:
    with running_node(tmp_path) as node, RankBed(node, blocks=40) as rank:
        found = SideBed(node, rank)
        try:
            found.attach()
            yield found
        finally:
            found.side.close()


def fill(bed: SideBed, request: Any, chunks: int) -> None:
    """The pool has so many chunks of the request's tokens."""
    salt = (request.cache_salt or "").encode()
    keys = Chain(MANIFEST.namespace(), CHUNK, salt).extend(request.all_token_ids)[:chunks]
    bed.bed.store(keys, (IDS * 4)[: 2 * chunks])


def test_workers_are_told_the_name(bed: SideBed) -> None:
    assert bed.told == [MANIFEST.description()]


@pytest.mark.parametrize("params", [{"transfer_id": "e" * 32, "role": "decode"}, {"ledger": "e" * 32}])
@pytest.mark.parametrize("good", [2 * CHUNK, 0])
def test_what_was_loaded_stands_in_the_ledger(bed: SideBed, params: dict[str, str], good: int) -> None:
    request = make_request("r", 2 * CHUNK + 10, kv_transfer_params={"lmkv": params})
    fill(bed, request, 2)
    bed.side.new_request(request, False)
    bed.found(request)
    bed.side.allocated(request, bed.blocks(), (0, 2 * CHUNK))
    bed.step(request, 0, 0)
    bed.side.take([LoadReport("r", good, "" if good else "corrupt", 1, 0.1)], Counter())
    ledger = bed.book.to_json("e" * 32)
    if not good:
        assert ledger == b""
        return
    pool = json.loads(ledger)["pool"]
    assert pool["tokens"] == [0, 2 * CHUNK] and [node["pages"] for node in pool["nodes"].values()] == [2]


def test_a_prompt_in_the_pool_is_loaded_and_its_rest_stored(bed: SideBed) -> None:
    request = make_request("r", 5 * CHUNK + 10)
    fill(bed, request, 3)
    bed.side.new_request(request, False)
    assert bed.found(request) == 3 * CHUNK
    bed.side.allocated(request, bed.blocks(), (0, 3 * CHUNK))
    assert bed.side.has_news
    meta = bed.step(request, 0, 0)
    (load,) = meta.loads
    assert (load.tokens, [page.chunk for page in load.pages]) == ((0, 3 * CHUNK), [0, 1, 2])
    assert load.blocks[0].ids == tuple(range(1, 7))
    bed.side.take([LoadReport("r", 3 * CHUNK, "", 1, 0.1)], Counter())
    (store,) = bed.step(request, 3 * CHUNK, 2 * CHUNK + 10).stores
    assert (store.first, len(store.keys)) == (3, 2)
    assert store.blocks[0].lo == 6 and store.blocks[0].ids == (7, 8, 9, 10)
    request.all_token_ids += list(range(CHUNK))
    request.num_tokens += CHUNK
    assert not bed.step(request, 5 * CHUNK + 10, 1).stores
    (answer,) = bed.step(request, 6 * CHUNK - 1, 1).stores
    assert answer.first == 5
    assert bed.side.finished(request) is True


def test_tokens_that_are_not_known_yet_are_not_named(bed: SideBed) -> None:
    """Async scheduling computes ahead of the ids."""
    request = make_request("r", 2 * CHUNK - 1)
    bed.side.new_request(request, False)
    bed.found(request)
    (store,) = bed.step(request, 0, 2 * CHUNK).stores
    assert (store.first, len(store.keys)) == (0, 1)


def test_what_is_cached_here_is_not_counted(bed: SideBed) -> None:
    request = make_request("r", 4 * CHUNK)
    fill(bed, request, 2)
    bed.side.new_request(request, False)
    assert bed.found(request, computed=2 * CHUNK - 8) == 0
    assert bed.count("lookup:miss") >= 2


def test_a_load_that_is_cut_is_stored_again_from_there(bed: SideBed) -> None:
    request = make_request("r", 4 * CHUNK)
    fill(bed, request, 4)
    bed.side.new_request(request, False)
    assert bed.found(request) == 4 * CHUNK
    bed.side.allocated(request, bed.blocks(), (0, 4 * CHUNK))
    (load,) = bed.step(request, 0, 0).loads
    report = LoadReport("r", CHUNK, "corrupt", 1, 0.1, (load.pages[1],))
    bed.side.take([report], Counter({"load:corrupt": 1}))
    assert bed.count("load:corrupt") == 1
    assert bed.found(request) == 0, "vLLM computes the rest"
    (store,) = bed.step(request, CHUNK, 3 * CHUNK).stores
    assert store.first == 1

    def corrupt() -> bool:
        return bool(json.loads(bed.bed.ask(pw.Stats, pw.StatsAre).stats)["counters"].get("corrupt"))

    bed.bed.until(corrupt)


def test_after_a_preemption_the_pool_is_asked_again(bed: SideBed) -> None:
    request = make_request("r", 3 * CHUNK)
    bed.side.new_request(request, False)
    assert bed.found(request) == 0
    assert bed.step(request, 0, 3 * CHUNK).stores
    assert bed.step(request, 0, 0, preempted=("r",)).overwritten == ["r"]
    fill(bed, request, 3)
    request.num_preemptions = 1
    assert bed.found(request) == 3 * CHUNK


def test_a_preempted_request_that_ends_while_it_loads_is_not_told_as_sent(bed: SideBed) -> None:
    """vLLM frees its blocks when it is told as received, and asserts that it still knows who is told as sent."""
    request = make_request("r", 3 * CHUNK)
    bed.side.new_request(request, False)
    assert bed.found(request) == 0
    books = PoolBooks((BLOCK,))
    books.bind(bed.step(request, 0, 3 * CHUNK))
    assert books.storing == {"r"}
    books.bind(bed.step(request, 0, 0, preempted=("r",)))
    assert books.storing == set()
    fill(bed, request, 3)
    request.num_preemptions = 1
    assert bed.found(request) == 3 * CHUNK
    bed.side.allocated(request, bed.blocks(), (0, 3 * CHUNK))
    assert bed.side.is_loading(request.request_id)
    assert bed.side.finished(request) is False and not bed.side.is_loading(request.request_id)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"pooling_params": object()}, "pooling"),
        ({"resumable": True}, "resumable"),
        ({"mm_features": [SimpleNamespace(identifier="the client's own")]}, "mm_uuid"),
    ],
)
def test_requests_without_a_name(bed: SideBed, more: dict[str, Any], why: str) -> None:
    request = make_request("r", 3 * CHUNK, **more)
    bed.side.new_request(request, False)
    assert bed.side.found(request, 0) == 0
    assert not bed.step(request, 0, 3 * CHUNK).stores
    assert bed.side.finished(request) is False
    assert bed.count(f"not_pooled:{why}") == 1


def test_approximate_and_inexact_kv_is_not_stored(bed: SideBed) -> None:
    approximate, inexact = make_request("a", 3 * CHUNK), make_request("i", 3 * CHUNK, 7)
    bed.side.new_request(approximate, True)
    bed.side.new_request(inexact, False)
    bed.side.inexact("i")
    assert not bed.step(approximate, 0, 3 * CHUNK).stores
    assert not bed.step(inexact, 0, 3 * CHUNK).stores


def test_salts_images_and_embeddings_are_part_of_the_name(bed: SideBed) -> None:
    plain = make_request("plain", 3 * CHUNK)
    fill(bed, plain, 3)
    place = SimpleNamespace(offset=10, length=20)
    image = SimpleNamespace(modality="image", identifier="ab" * 32, mm_position=place)
    others = [
        make_request("salt", 3 * CHUNK, cache_salt="x"),
        make_request("image", 3 * CHUNK, mm_features=[image]),
    ]
    for request in others:
        bed.side.new_request(request, False)
        assert bed.found(request) == 0, request.request_id
    bed.side.new_request(plain, False)
    assert bed.found(plain) == 3 * CHUNK


def test_an_adapter_is_named_by_its_content(bed: SideBed, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), lora_name="judge", is_3d_lora_weight=False)
    first = make_request("first", 3 * CHUNK, lora_request=lora)
    bed.side.new_request(first, False)
    assert bed.count("not_pooled:adapter_unknown") == 1
    until_s = time.monotonic() + 10
    number = 0
    while True:
        number += 1
        request = make_request(f"later{number}", 3 * CHUNK, lora_request=lora)
        unknown = bed.count("not_pooled:adapter_unknown")
        bed.side.new_request(request, False)
        if bed.count("not_pooled:adapter_unknown") == unknown:
            break
        assert time.monotonic() < until_s
        time.sleep(0.01)
    (with_adapter,) = bed.step(request, 0, 3 * CHUNK).stores
    plain = make_request("plain", 3 * CHUNK)
    bed.side.new_request(plain, False)
    (without,) = bed.step(plain, 0, 3 * CHUNK).stores
    assert not set(with_adapter.keys) & set(without.keys)


def test_another_name_begins_with_new_requests(bed: SideBed) -> None:
    running = make_request("running", 4 * CHUNK)
    bed.side.new_request(running, False)
    bed.side.renamed(dataclasses.replace(MANIFEST, epoch="1"))
    assert len(bed.told) == 2 and bed.told[0] != bed.told[1]
    assert not bed.step(running, 0, 4 * CHUNK).stores, "computed with the old weights, in part"
    fresh = make_request("fresh", 4 * CHUNK)
    fill(bed, fresh, 4)
    bed.side.new_request(fresh, False)
    assert bed.found(fresh) == 0
    (store,) = bed.step(fresh, 0, 4 * CHUNK).stores
    assert store.namespace != MANIFEST.namespace()


def test_a_request_that_ends_while_it_loads_holds_nothing(bed: SideBed) -> None:
    request = make_request("r", 3 * CHUNK)
    fill(bed, request, 3)
    bed.side.new_request(request, False)
    assert bed.found(request) == 3 * CHUNK
    bed.side.allocated(request, bed.blocks(), (0, 3 * CHUNK))
    bed.step(request, 0, 0)
    assert bed.side.finished(request) is False
    assert bed.step(request, 0, 0).ended == ["r"]
    bed.side.take([LoadReport("r", 0, "cancelled", 0, 0.1)], Counter())

    def free() -> bool:
        return json.loads(bed.bed.ask(pw.Stats, pw.StatsAre).stats)["leases"] == 0

    bed.bed.until(free)
