"""lmkv_shim's ops that re-position and code, declared once; see tests/kernels/shim.py for the library."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from lmkv.kernels import _load

RESULTS = {"rotate_keys": "bool", "encode_pages": "bool", "decode_pages": "bool"}
"""What the shim's op returns: whether it used vectors."""


@functools.cache
def declare() -> None:
    for name, result in RESULTS.items():
        schema = _load.SCHEMAS[name].replace(") -> ()", f", int warps) -> {result}")
        torch.library.define(f"lmkv_shim::{name}", schema)


@contextmanager
def running(name: str, warps: int) -> Iterator[list[bool]]:
    """lmkv.kernels runs the GPU's body for this op, on a grid of `warps` warps; the list has what it returned."""
    declare()
    returned: list[bool] = []

    def run(*arguments: object) -> None:
        returned.append(bool(getattr(torch.ops.lmkv_shim, name)(*arguments, warps)))

    with mock.patch.object(torch.ops.lmkv, name, run):
        yield returned


@contextmanager
def swapped(name: str, reference: object) -> Iterator[None]:
    """lmkv.kernels runs this function instead of the op."""
    with mock.patch.object(torch.ops.lmkv, name, reference):
        yield
