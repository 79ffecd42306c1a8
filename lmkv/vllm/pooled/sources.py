"""Where a request's KV comes from: the pool, a prefill engine, or this engine's own computing. Engine thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmkv.ids import RequestId

from ..decode import DecodeSide
from .side import PoolSide


@dataclass(frozen=True, slots=True)
class _Choice:
    """Tokens [lo, hi) come from the pool, unless vLLM allocates for others."""

    lo: int
    hi: int


class Sources:
    """`pool` None: there is none."""

    def __init__(self, decode: DecodeSide, pool: PoolSide | None) -> None:
        self._decode = decode
        self._pool = pool
        self._choices: dict[RequestId, _Choice] = {}

    def matched_tokens(self, request: Any, computed: int, handed_over: bool) -> tuple[int | None, bool]:
        """(tokens to load, asynchronously); None: ask again. `handed_over`: a prefill engine is at work for it.

        What the pool has to within a chunk is loaded from there; otherwise prefill sends everything, since it has
        begun, and loads from the pool what it can itself.
        """
        if self._pool is None:
            if not handed_over:
                return 0, False
            self._decode.take_failure(request)  # what prefill has given up is not asked for
            return self._decode.matched_tokens(request, computed)
        self._choices.pop(request.request_id, None)
        if handed_over and self._decode.take_failure(request):
            self._pool.retry(request)
        found = self._pool.found(request, computed)
        if found is None:
            return None, False
        enough = found > 0 and request.num_tokens - found < self._pool.chunk_tokens
        if handed_over and not enough:
            missing, later = self._decode.matched_tokens(request, computed)
            if missing is None or missing > 0:
                return missing, later
        if found <= computed:
            return 0, False
        self._choices[request.request_id] = _Choice(computed, found)
        return found - computed, True

    def allocated(self, request: Any, blocks: Any, external_tokens: int, handed_over: bool) -> None:
        choice = self._choices.pop(request.request_id, None)
        if self._pool is not None and choice is not None and external_tokens == choice.hi - choice.lo:
            self._pool.allocated(request, blocks, (choice.lo, choice.hi))
            external_tokens = 0
        elif self._pool is not None:
            self._pool.not_loaded(request)
        if handed_over:
            self._decode.allocated(request, blocks, external_tokens)
            if self._pool is not None and not self._decode.is_exact(request):
                self._pool.inexact(request.request_id)
