"""Ops that fail once, as one does whose device has no memory left."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch

import lmkv.kernels  # noqa: F401  (registers the ops)

OPS = ("convert_blocks", "pack_pages", "unpack_pages")


class BrokenOps:
    """`fail_next` makes the next call of one op fail, whoever makes it."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        try:
            yield
        finally:
            for name in list(self._kept):
                self._mend(name)

    def fail_next(self, rnd: random.Random) -> None:
        name = rnd.choice(OPS)
        if name in self._kept:
            return
        self._kept[name] = getattr(torch.ops.lmkv, name)

        def fail(*_: Any, **__: Any) -> None:
            self._mend(name)
            raise RuntimeError("out of memory (by injection)")

        setattr(torch.ops.lmkv, name, fail)

    def _mend(self, name: str) -> None:
        setattr(torch.ops.lmkv, name, self._kept.pop(name))
