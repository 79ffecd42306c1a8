"""Decode's scheduler half: grants, the wait for KV, failed loads, and blocks in quarantine.

Runs on the engine thread. A transfer id belongs to one request at first; with n > 1 its siblings carry the same id,
wait until the first has loaded, and then find the prompt in the local prefix cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox
from lmkv.control.pairing import PairState
from lmkv.control.runtime import THREADS, Runtime
from lmkv.ids import Epoch, Incarnation, RequestId, TransferId
from lmkv.obs.ledger import LedgerBook
from lmkv.transfer.prompt import PROMPT_FAULT, UNKNOWN, Prompt

from .endpoint import EngineEndpoint
from .metadata import StepMeta
from .params import RequestParams
from .pooled.adapters import Adapters
from .prompt import prompt_of
from .specs import BlockRange, ExpectSpec, RankReport

QUARANTINE_STEPS_S = 60.0
_REMEMBERED = 4096
_MISSING = object()


class _State(Enum):
    NEW = auto()
    LOADING = auto()
    DONE = auto()


@dataclass(slots=True)
class _Transfer:
    params: RequestParams
    arrived_s: float
    state: _State = _State.NEW
    loader: RequestId | None = None
    requests: set[RequestId] = field(default_factory=set)
    prompt: Prompt | None = None
    """Known as soon as a grant is possible."""
    block_ids: tuple[int, ...] = ()
    reports: int = 0
    exact: bool = True
    """What comes is what this engine would compute."""
    failed: bool = False
    """It has brought nothing, and that has not been asked for yet (`take_failure`)."""
    undrained: int = 0
    held_s: float = 0.0
    held: list[Any] = field(default_factory=list)
    """Blocks in quarantine: referenced by us until no writer can touch them."""


class DecodeSide:
    """`incarnation` is this engine's own; `world` its number of ranks."""

    def __init__(
        self,
        settings: ConnectorSettings,
        incarnation: Incarnation,
        block_tokens: tuple[int, ...],
        select: Callable[[Any], tuple[list[int], ...]],
        endpoint: EngineEndpoint,
        outbox: Outbox,
        book: LedgerBook,
        world: int,
        adapters: Adapters,
        runtime: Runtime = THREADS,
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._incarnation = incarnation
        self._block_tokens = block_tokens
        self._select = select
        self._endpoint = endpoint
        self._outbox = outbox
        self._book = book
        self._world = world
        self._adapters = adapters
        self._transfers: dict[TransferId, _Transfer] = {}
        self._by_request: dict[RequestId, _Transfer] = {}
        self._expects: list[ExpectSpec] = []
        self._abandons: list[TransferId] = []
        self._block_pool: Any = None
        self._epoch = 0
        self._parked: OrderedDict[TransferId, None] = OrderedDict()

    def bind_block_pool(self, pool: Any) -> None:
        self._block_pool = pool

    def parked(self, tid: TransferId) -> None:
        """From the endpoint's thread: prefill has given the transfer up; what is whole of it is in the pool."""
        self._parked[tid] = None
        while len(self._parked) > _REMEMBERED:
            self._parked.popitem(last=False)

    def take_failure(self, request: Any) -> bool:
        """The transfer will bring nothing (any more), as was not known before. Told once."""
        transfer = self._by_request[request.request_id]
        if self._parked.pop(transfer.params.transfer_id, _MISSING) is not _MISSING and transfer.state is _State.NEW:
            transfer.state, transfer.failed = _State.DONE, True
            self._miss(transfer, "parked", "prefill has held it for long enough")
        failed, transfer.failed = transfer.failed, False
        return failed

    # --- a request's way in ---

    def new_request(self, request: Any, params: RequestParams) -> None:
        transfer = self._transfers.get(params.transfer_id)
        now_s = self._runtime.clock()
        if transfer is None:
            transfer = self._transfers[params.transfer_id] = _Transfer(params, now_s)
            self._book.update(
                params.transfer_id, role="decode", prompt_tokens=request.num_prompt_tokens, arrived_s=now_s
            )
        transfer.requests.add(request.request_id)
        self._by_request[request.request_id] = transfer
        self._endpoint.pair(params.peer_address)

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens to load, asynchronously), or (None, False): ask again in the next step."""
        transfer = self._by_request[request.request_id]
        if transfer.state is _State.DONE:
            return 0, False
        if transfer.state is _State.LOADING:
            return None, False
        missing = request.num_prompt_tokens - computed_tokens
        if missing < self._settings.min_remote_tokens:
            return 0, False
        state, reason, _ = self._endpoint.pair(transfer.params.peer_address)
        if state is PairState.READY:
            return self._bound(transfer, request, missing)
        if state is PairState.PENDING and self._runtime.clock() - transfer.arrived_s < self._settings.pair_s:
            return None, False
        self._miss(transfer, "refused" if reason else "not_paired", reason)
        return 0, False

    def _bound(self, transfer: _Transfer, request: Any, missing: int) -> tuple[int | None, bool]:
        """The grant will say which prompt it is for; without knowing that there is none."""
        if transfer.prompt is None:
            prompt = prompt_of(request, self._adapters)
            if not prompt.digest:
                self._miss(transfer, "prompt", f"{UNKNOWN} is not known (yet)")
                return 0, False
            transfer.prompt = prompt
        return missing, True

    def is_exact(self, request: Any) -> bool:
        """No: its KV has been converted from another dtype."""
        return self._by_request[request.request_id].exact

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """Blocks are allocated: grant them, or tell prefill that nothing is needed."""
        transfer = self._by_request[request.request_id]
        if transfer.state is not _State.NEW:
            return
        if external_tokens == 0:
            transfer.state = _State.DONE
            self._not_needed(transfer, "decode has the prompt or computes it")
            return
        first_token = request.num_prompt_tokens - external_tokens
        tables = self._select(blocks.get_block_ids())
        ranges = []
        for group, (table, n) in enumerate(zip(tables, self._block_tokens, strict=True)):
            first, last = first_token // n, -(-request.num_prompt_tokens // n)
            while first < last and table[first] == 0:  # vLLM's null block: behind a sliding window
                first += 1
            ranges.append(BlockRange(group, first, tuple(table[first:last])))
        self._grant(transfer, request, (first_token, request.num_prompt_tokens), tuple(ranges))

    def _grant(
        self, transfer: _Transfer, request: Any, tokens: tuple[int, int], ranges: tuple[BlockRange, ...]
    ) -> None:
        # Asked before the pair's state: a pair that is lost in between makes the grant void, not the other way round.
        number = self._endpoint.pair_number(transfer.params.peer_address)
        self._epoch += 1  # never used again, whatever the router does with transfer ids
        tid, epoch = transfer.params.transfer_id, Epoch(self._epoch)
        prompt = transfer.prompt
        assert prompt is not None, "tokens were promised only once the prompt was known"
        _, _, card = self._endpoint.pair(transfer.params.peer_address)
        # The pair may be lost since matched_tokens said READY: then nothing is granted and the load fails at once.
        incarnation = card.incarnation if card is not None else Incarnation("")
        landing = card is not None and not self._endpoint.is_direct(card)
        theirs = self._their_blocks(card, ranges, tokens) if card is not None and landing else ()
        now_s = self._runtime.clock()
        first_block = tuple(lo for lo, _ in theirs) or tuple(r.lo for r in ranges)
        wanted = tuple((1,) * (hi - lo) for lo, hi in theirs) or tuple(r.ids for r in ranges)
        grant = wire.Grant(
            self._incarnation, tid, epoch, *tokens, first_block, wanted, now_s, landing, prompt.digest, number
        )
        for worker in card.workers if card is not None else ():
            self._outbox.send(worker.address, grant)
        transfer.exact = card is None or self._endpoint.is_exact(card)
        transfer.state, transfer.loader = _State.LOADING, request.request_id
        transfer.block_ids = tuple(i for r in ranges for i in r.ids if i)
        self._expects.append(ExpectSpec(tid, request.request_id, epoch, incarnation, number, ranges, tokens, theirs))
        self._book.update(
            tid,
            granted_s=now_s,
            first_token=tokens[0],
            granted_blocks=len(transfer.block_ids),
            peer=incarnation,
            mode="landing" if landing else "direct",
        )

    def _their_blocks(
        self, card: wire.EngineCard, ranges: tuple[BlockRange, ...], tokens: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        """The blocks of the other engine that hold these tokens, but for what our null blocks leave out."""
        found = []
        for blocks, ours, theirs in zip(ranges, self._block_tokens, card.block_tokens, strict=True):
            first_token = max(tokens[0], blocks.lo * ours)
            found.append((first_token // theirs, max(first_token // theirs, -(-tokens[1] // theirs))))
        return tuple(found)

    # --- the steps ---

    @property
    def has_news(self) -> bool:
        """A step is wanted: to tell the workers something, or to learn that a young quarantine is over.

        An idle engine does not step, so it would keep quarantined blocks until its next request. Stepping for them
        costs CPU; after `QUARANTINE_STEPS_S` they wait for that request.
        """
        if self._expects or self._abandons:
            return True
        oldest_s = self._runtime.clock() - QUARANTINE_STEPS_S
        return any(t.held and t.held_s > oldest_s for t in self._transfers.values())

    @property
    def has_pending_frees(self) -> bool:
        return any(t.state is _State.LOADING and t.loader not in t.requests for t in self._transfers.values())

    def fill(self, meta: StepMeta) -> None:
        meta.expects += self._expects
        meta.abandons += self._abandons
        self._expects, self._abandons = [], []

    def reported(self, report: RankReport) -> None:
        """A rank has ended its part (called before vLLM acts on the same step's finished sets)."""
        if report.slots:
            self._book.count("quarantined_slots", report.slots)
        transfer = self._transfers.get(report.transfer_id)
        if transfer is None or report.slots < 0:
            return
        if report.outcome == "drained":
            transfer.undrained -= 1
            self._release_quarantine(transfer)
            return
        transfer.reports += 1
        if not report.drained:
            transfer.undrained += 1
            self._quarantine(transfer)
        if report.outcome == "failed":
            kind = "prompt" if report.reason.startswith(PROMPT_FAULT) else "load_failed"
            self._miss(transfer, kind, report.reason.removeprefix(PROMPT_FAULT))
            transfer.failed = True
        if transfer.reports == self._world:
            transfer.state = _State.DONE
            self._book.update(report.transfer_id, loaded_s=self._runtime.clock(), outcome=report.outcome)
            self._book.count(f"receive:{report.outcome}")
            self._drop_if_over(transfer)

    def finished(self, request: Any) -> None:
        """The request has ended, in whatever way. vLLM keeps the blocks of one still loading until it is reported."""
        transfer = self._by_request.pop(request.request_id)
        transfer.requests.discard(request.request_id)
        if transfer.state is _State.LOADING and transfer.loader == request.request_id:
            self._abandons.append(transfer.params.transfer_id)
        elif transfer.state is _State.NEW and not transfer.requests:
            transfer.state = _State.DONE
            self._not_needed(transfer, "request ended before its grant")
        self._book.update(transfer.params.transfer_id, finished_s=self._runtime.clock())
        self._drop_if_over(transfer)

    # --- inside ---

    def _not_needed(self, transfer: _Transfer, reason: str) -> None:
        tid = transfer.params.transfer_id
        self._endpoint.tell(transfer.params.peer_address, wire.NotNeeded(self._incarnation, tid, reason))
        self._book.update(tid, not_needed=reason)
        self._book.count("receive:not_needed")

    def _miss(self, transfer: _Transfer, kind: str, reason: str) -> None:
        self._book.count(f"miss:{kind}")
        self._book.update(transfer.params.transfer_id, miss=f"{kind}: {reason}" if reason else kind)

    def _quarantine(self, transfer: _Transfer) -> None:
        if transfer.held or self._block_pool is None:
            return
        transfer.held = [self._block_pool.blocks[i] for i in transfer.block_ids]
        transfer.held_s = self._runtime.clock()
        self._block_pool.touch(transfer.held)
        self._book.count("quarantined_blocks", len(transfer.held))

    def _release_quarantine(self, transfer: _Transfer) -> None:
        if transfer.undrained == 0 and transfer.held:
            self._block_pool.free_blocks(reversed(transfer.held))
            self._book.count("quarantined_blocks", -len(transfer.held))
            transfer.held = []
            self._drop_if_over(transfer)

    def _drop_if_over(self, transfer: _Transfer) -> None:
        if not transfer.requests and transfer.state is _State.DONE and not transfer.held:
            self._transfers.pop(transfer.params.transfer_id, None)
