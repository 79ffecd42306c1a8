"""Two worker loops with real memory and mailboxes: a prefill rank and a decode rank, driven as their engines do."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import zmq

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.ids import EngineName, Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer.prompt import Prompt
from lmkv.transport import open_transport
from lmkv.vllm import memory
from lmkv.vllm.cards import times, worker_card
from lmkv.vllm.commands import Command, Expected, LayersDone, Offered, Results, StepDone
from lmkv.vllm.geometry import Shard
from lmkv.vllm.specs import BlockRange, ExpectSpec, OfferSpec, Push, RankReport
from lmkv.vllm.writer import WorkerLoop

TOKENS, HEADS, LAYERS = 16, 2, 2
PROMPT = Prompt(b"p" * 16, 4 * TOKENS)


@dataclass
class FullAttentionSpec:
    head_size: int
    head_size_v: int
    block_size: int


def caches(blocks: int, seed: int) -> tuple[memory.KvMemory, torch.Tensor]:
    """KvMemory over [layers, blocks, heads, tokens, 16] of random numbers, and the tensor."""
    whole = torch.randn(LAYERS, blocks, HEADS, TOKENS, 16, generator=torch.Generator().manual_seed(seed))
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec(8, 8, TOKENS))
    names = {f"layer{i}": 0 for i in range(LAYERS)}
    config = SimpleNamespace(transfer_group_index_by_layer=names, transfer_groups=(group,), num_blocks=blocks)
    return memory.describe(dict(zip(names, whole, strict=True)), config, "FLASH_ATTN", Shard(0, 1, HEADS)), whole


class Side:
    """One engine of one rank: its loop, its engine's mailbox, its card."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], role: str, scheme: str, **settings: Any) -> None:
        self.settings = ConnectorSettings(transport=scheme, **settings)
        self.found, self.kv = caches(12, len(role))
        self.incarnation = Incarnation(secrets.token_hex(8))
        self.engine = Inbox(context, "tcp://127.0.0.1:0")
        self.loop = WorkerLoop(
            self.settings,
            Rank(0),
            open_transport(scheme, f"{role}-{secrets.token_hex(4)}"),
            self.found,
            "tcp://127.0.0.1:0",
        )
        self.loop.start()
        worker = worker_card(self.found, self.settings, Rank(0), self.loop.address, self.loop.export)
        name = EngineName(role)
        self.card = wire.EngineCard(
            name, self.incarnation, self.engine.address, role, {}, {}, (TOKENS,), (worker,), times=times(self.settings)
        )
        self.news = Results()

    def submit(self, *commands: Command) -> None:
        for command in commands:
            self.loop.submit(command)

    def take(self) -> Results:
        self.news.add(self.loop.take(0.01))
        return self.news

    def introduced(self) -> list[str]:
        """What the loop has told its engine of peers since the last time ("" is: ready)."""
        letters = [letter.message for letter in self.engine.receive()]
        return [m.error for m in letters if isinstance(m, wire.Introduced)]

    def close(self) -> None:
        self.loop.close()
        self.engine.close()


def until(condition: Callable[[], Any], seconds: float = 40.0) -> Any:
    end_s = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end_s, "it takes too long"
        time.sleep(0.002)
    return found


class Pair:
    """Prefill and decode, paired."""

    def __init__(self, scheme: str = "inproc://", **settings: Any) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.outbox = Outbox(self.context)
        self.prefill = Side(self.context, "prefill", scheme, **settings)
        self.decode = Side(self.context, "decode", scheme, **settings)
        self.introduce()

    def introduce(self, number: int = 0) -> None:
        """`number`: of the pair, on both sides."""
        sides = (self.prefill, self.decode)
        for own, other in (sides, sides[::-1]):
            self.outbox.send(own.loop.address, wire.Introduce(other.card, own.card, number, number))
        for side in sides:
            until(lambda side=side: "" in side.introduced())

    # --- one transfer ---

    def offer(self, tid: TransferId, prompt: Prompt = PROMPT) -> None:
        self.prefill.submit(Offered((OfferSpec(tid, RequestId(f"p-{tid}"), prompt),)))

    def compute(self, tid: TransferId, ids: tuple[int, ...], lo: int = 0, last: bool = True) -> None:
        """Blocks from `lo` on are computed in all layers."""
        push = Push(tid, (), (BlockRange(0, lo, ids),), last)
        self.prefill.submit(LayersDone((push,), 0, 0, LAYERS, None, time.monotonic()), StepDone((push,)))

    def grant(self, tid: TransferId, ids: tuple[int, ...], prompt: Prompt = PROMPT, **more: Any) -> None:
        made = wire.Grant(
            self.decode.incarnation, tid, Epoch(1), 0, prompt.tokens, (0,), (ids,), time.monotonic(),
            prompt_digest=prompt.digest,
        )  # fmt: skip
        self.outbox.send(self.prefill.loop.address, msgspec.structs.replace(made, **more))

    def expect(self, tid: TransferId, ids: tuple[int, ...], number: int = 0) -> None:
        blocks, them = (BlockRange(0, 0, ids),), self.prefill.incarnation
        spec = ExpectSpec(tid, RequestId(f"d-{tid}"), Epoch(1), them, number, blocks, (0, PROMPT.tokens))
        self.decode.submit(Expected((spec,)))

    def report(self, tid: TransferId, outcome: str = "", seconds: float = 40.0) -> RankReport:
        def find() -> RankReport | None:
            found = [r for r in self.decode.take().reports if r.transfer_id == tid]
            return next((r for r in found if r.outcome == outcome or not outcome), None)

        found: RankReport = until(find, seconds)
        return found

    def ledger(self, tid: TransferId) -> dict[str, Any]:
        """Prefill's ledger of an ended transfer."""
        found: dict[str, Any] = until(
            lambda: next((g for g in self.prefill.take().ledgers if g["transfer_id"] == tid), None)
        )
        return found

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()
        self.outbox.close()
        self.context.term()
