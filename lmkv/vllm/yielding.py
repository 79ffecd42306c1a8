"""Notices that finished prompts keep an engine from computing anything, and says which of them is to give way.

Prefill holds the blocks of a finished prompt until decode grants its own for it, and decode holds granted blocks until
the KV has come. With small caches each may hold what the other waits for: prefill has no blocks left for the prompts
that decode has granted, and decode none for those that prefill has finished. Both would stand still until a deadline.
Prefill may look busy then: a request that finds too few blocks is computed in part, preempted, and computed again.

Engine thread only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lmkv.ids import RequestId, TransferId

YIELD_S = 1.0
"""An engine that could run nothing for so long, for want of blocks, asks one more finished prompt to give way."""


class Yielding:
    """Follows vLLM's scheduling: `asked` and `served` for each waiting request that vLLM looks at; `loads`, `loaded`
    and `ran` for those whose KV comes from elsewhere; `chosen` at the end of each step."""

    def __init__(self) -> None:
        self._held: dict[RequestId, TransferId] = {}
        """Ended requests whose blocks wait to be sent, the oldest first."""
        self._tried: set[RequestId] = set()
        self._wanting: RequestId | None = None
        self._loading: set[RequestId] = set()
        self._loaded: set[RequestId] = set()
        """Requests whose KV has come and that have not run since. vLLM does not ask for them again: it looks for blocks
        for the rest of their tokens at once."""
        self._preempted_s: dict[RequestId, float] = {}
        """Requests that were preempted within the last YIELD_S, and when: what is computed of them comes to nothing."""
        self._stuck_s: float | None = None
        """Since when nothing has come forward although a request wanted blocks."""

    def held(self, request_id: RequestId, transfer_id: TransferId) -> None:
        """The request has ended, and its blocks are kept."""
        self._held[request_id] = transfer_id

    def freed(self, request_ids: set[str]) -> list[TransferId]:
        """Returns the transfers of those that were held."""
        freed = [RequestId(r) for r in request_ids & self._held.keys()]
        self._tried.difference_update(freed)
        return [self._held.pop(request_id) for request_id in freed]

    def asked(self, request_id: RequestId) -> None:
        """vLLM is about to look for blocks for a waiting request."""
        self._wanting = request_id

    def served(self) -> None:
        """It has found them."""
        self._wanting = None

    def loads(self, request_id: RequestId) -> None:
        """It waits for KV from elsewhere (again, if what was tried first has failed)."""
        self._loaded.discard(request_id)
        self._loading.add(request_id)

    def loaded(self, request_ids: Iterable[RequestId]) -> None:
        """The KV of these has come, or will not."""
        self._loaded |= self._loading.intersection(request_ids)
        self._loading.difference_update(request_ids)

    def ran(self, request_ids: Iterable[RequestId]) -> None:
        """They are computed, or have ended."""
        self._loading.difference_update(request_ids)
        self._loaded.difference_update(request_ids)

    def chosen(
        self, computed: Collection[RequestId], preempted: Iterable[RequestId], now_s: float
    ) -> TransferId | None:
        """The transfer that is to give way, if any. The step computes tokens of `computed`, after vLLM has taken the
        blocks of `preempted`.

        The newest comes first: decode takes requests in their order, so it will ask for that one last.
        """
        self.ran(computed)
        wanting, self._wanting = self._wanting, None
        self._preempted_s = {r: then_s for r, then_s in self._preempted_s.items() if now_s - then_s < YIELD_S}
        self._preempted_s |= dict.fromkeys(preempted, now_s)
        comes_forward = any(request_id not in self._preempted_s for request_id in computed)
        wants = wanting is not None or self._loaded or self._preempted_s
        if comes_forward or not wants or not self._held:
            self._stuck_s = None
            return None
        if self._stuck_s is None:
            self._stuck_s = now_s
        if now_s - self._stuck_s < YIELD_S:
            return None
        self._stuck_s = now_s
        if self._held.keys() <= self._tried:
            self._tried.clear()
        request_id = next(r for r in reversed(self._held) if r not in self._tried)
        self._tried.add(request_id)
        return self._held[request_id]
