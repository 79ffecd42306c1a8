"""One transfer of a prefill rank to several decode ranks, as one lane of the Sender each.

The Sender knows one receiver a transfer. Where decode splits heads over more ranks than prefill, a prefill rank sends
to several: each gets a lane, which is a transfer of its own to the Sender, under an id derived from the transfer's.
What the engine says of the transfer is said to all its lanes; a lane that is opened late is told what was said before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lmkv.ids import Rank, RequestId, TransferId

from .events import Computed, Offer, Preempted, PromptDone, Rect, Revoke, SenderEvent, Withdraw
from .prompt import Prompt


@dataclass(slots=True)
class Fan:
    """The lanes of one transfer. `events` are for the Sender, in order."""

    transfer_id: TransferId
    request_id: RequestId | None = None
    prompt: Prompt | None = None
    """With `request_id`: what was offered."""
    computed: list[Rect] = field(default_factory=list)
    done: bool = False
    lanes: dict[Rank, TransferId] = field(default_factory=dict)
    """Decode rank → lane. Empty until the first grant: then the transfer's own id is the only lane."""
    ended: set[TransferId] = field(default_factory=set)
    stopped: str = ""
    """Why nothing of it is sent any more (withdrawn, revoked)."""

    @property
    def ids(self) -> list[TransferId]:
        """All lanes."""
        return list(self.lanes.values()) or [self.transfer_id]

    @property
    def over(self) -> bool:
        return all(lane in self.ended for lane in self.ids)

    def lane(self, rank: Rank) -> TransferId:
        """The lane of a decode rank; of one that has none (a message about nothing), the transfer's own id."""
        return self.lanes.get(rank, self.transfer_id)

    def open(self, ranks: Iterable[Rank]) -> list[SenderEvent]:
        """A grant for these decode ranks came: lanes for those that have none, told what the others know."""
        events: list[SenderEvent] = []
        for rank in ranks:
            if rank in self.lanes:
                continue
            first = not self.lanes
            lane = self.transfer_id if first else TransferId(f"{self.transfer_id}@{rank}")
            self.lanes[rank] = lane
            if first:
                continue  # it has been there from the start
            if self.request_id is not None and self.prompt is not None:
                events.append(Offer(lane, self.request_id, self.prompt))
                if self.stopped:
                    events.append(Withdraw(lane, self.stopped))
                    continue
                events += [Computed(lane, rect) for rect in self.computed]
                events += [PromptDone(lane)] if self.done else []
        return events

    def offer(self, request_id: RequestId, prompt: Prompt) -> list[SenderEvent]:
        self.request_id, self.prompt = request_id, prompt
        return [Offer(lane, request_id, prompt) for lane in self.ids]

    def compute(self, rect: Rect) -> list[SenderEvent]:
        self.computed.append(rect)
        return [Computed(lane, rect) for lane in self.ids]

    def prompt_done(self) -> list[SenderEvent]:
        self.done = True
        return [PromptDone(lane) for lane in self.ids]

    def preempt(self) -> list[SenderEvent]:
        self.computed.clear()
        self.done = False
        return [Preempted(lane) for lane in self.ids]

    def revoke(self, reason: str) -> list[SenderEvent]:
        self.stopped = reason
        return [Revoke(lane, reason) for lane in self.ids]

    def withdraw(self, reason: str) -> list[SenderEvent]:
        self.stopped = reason
        return [Withdraw(lane, reason) for lane in self.ids]


def transfer_of(lane: TransferId) -> TransferId:
    """The transfer that a lane belongs to."""
    return TransferId(lane.partition("@")[0])
