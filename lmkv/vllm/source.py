"""What prefill's loop knows of one transfer beside the machine: block ids, grants, the trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lmkv import wire
from lmkv.ids import Epoch, Incarnation, Rank, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.fanout import Fan, transfer_of
from lmkv.transfer.plan import KvMap, runs_for

from . import dump, memory
from .trace import SendTrace


@dataclass(slots=True)
class Source:
    """One transfer. `block_ids` are ours by group; grants by who sent them and which epoch they are."""

    trace: SendTrace
    block_ids: tuple[list[int], ...]
    fan: Fan
    grants: dict[tuple[Incarnation, Epoch], wire.Grant] = field(default_factory=dict)
    outcomes: list[ev.Finished] = field(default_factory=list)
    """Of the lanes that have ended."""
    revoked: bool = False
    """The machine has been told."""

    @staticmethod
    def of(tid: TransferId, rank: Rank, groups: int) -> Source:
        return Source(SendTrace(tid, rank), tuple([] for _ in range(groups)), Fan(tid))

    def is_void(self, incarnation: Incarnation, pair: int | None) -> bool:
        """This engine granted it, in other pairs than `pair` only. It may have a new data plane since, and then neither
        lends a slot for the old grant nor cancels it. None: there is no pair yet."""
        pairs = {grant.pair for (granter, _), grant in self.grants.items() if granter == incarnation}
        return pair is not None and bool(pairs) and pair not in pairs

    def end(self, last: ev.Finished, now_s: float) -> ev.Finished:
        """The last lane has ended: the trace is complete but for the clock offset. Returns the worst of the ends."""
        worst = next((end for end in self.outcomes if end.outcome is not ev.SendOutcome.SENT), last)
        self.trace.finished_s, self.trace.outcome, self.trace.reason = now_s, worst.outcome.value, worst.reason
        return worst

    def note(self, action: ev.PostWrite, rank: Rank, payload_bytes: int, checksum: int | None) -> wire.WriteNote:
        """What goes with a write."""
        rect = action.rect
        return wire.WriteNote(
            transfer_of(action.transfer_id),
            action.epoch,
            rank,
            action.seq,
            rect.group,
            rect.layer_lo,
            rect.layer_hi,
            rect.block_lo,
            rect.block_hi,
            payload_bytes,
            checksum,
            action.slot,
        )

    def dump(self, folder: str, grant: wire.Grant, found: memory.KvMemory, own: KvMap) -> None:
        """Write what was sent into files, to be compared with decode's (tests)."""
        layers, tid, rank = own.layers(), self.trace.transfer_id, self.trace.rank
        for group, (lo, ids) in enumerate(zip(grant.first_block, grant.block_ids, strict=True)):
            blocks = self.block_ids[group][lo : lo + len(ids)]
            path = Path(folder, f"{tid}-prefill-{rank}-{group}.kv")
            if grant.landing:
                first_token = lo * found.block_tokens[group]
                tokens = (max(first_token, grant.first_token), grant.prompt_tokens)
                dump.dump_page(path, found, group, blocks, tokens, first_token)
            else:
                rect = ev.Rect(group, 0, layers[group], lo, lo + len(ids))
                dump.dump_runs(path, runs_for(own, rect, blocks, ids))
