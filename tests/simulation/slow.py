"""Ops that take long: everybody else goes on while the worker's loop is in the middle of one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

import lmkv.kernels  # noqa: F401  (registers the ops)

OPS = ("checksum_runs", "convert_blocks", "pack_pages", "unpack_pages")
LONGEST_S = 0.02


class SlowOps:
    """A `share` of calls takes up to LONGEST_S, before or after all is read and written. `run_for(seconds)` gives the
    others their turns meanwhile."""

    def __init__(self, rnd: random.Random, share: float, run_for: Callable[[float], None]) -> None:
        self._rnd = rnd
        self.share = share
        self._run_for = run_for

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        kept = {name: getattr(torch.ops.lmkv, name) for name in OPS if self.share}
        for name, op in kept.items():
            setattr(torch.ops.lmkv, name, self._slowed(op))
        try:
            yield
        finally:
            for name, op in kept.items():
                setattr(torch.ops.lmkv, name, op)

    def _slowed(self, op: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if self._rnd.random() >= self.share:
                return op(*args)
            at_first = self._rnd.random() < 0.5
            if at_first:
                self._run_for(self._rnd.random() * LONGEST_S)
            result = op(*args)
            if not at_first:
                self._run_for(self._rnd.random() * LONGEST_S)
            return result

        return call
