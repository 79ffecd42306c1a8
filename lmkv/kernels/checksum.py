"""`checksum_runs`: the checksum of bytes that lie here and there in one tensor. The op, and its reference in torch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from lmkv.errors import LayoutError

from ._guard import kernel_errors
from .ops import loaded
from .reference import mix

WORD_BYTES = 8


@kernel_errors("checksum_runs")
def checksum_runs(
    data: torch.Tensor, runs: ArrayLike, first: int = 0, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The checksum of the bytes of `runs`, one after the other, as an int64 bit pattern on the device of `data`.

    `data` is a contiguous uint8 tensor of one dimension; `runs` is (R, 2), offset and bytes of each. The bytes count as
    if they lay in one piece, filled up with zero bytes to words of 8: it does not matter how they are cut into runs,
    but their order does. Word i adds `mix(word, first + i)` (docs/page-format.md). Bytes of several tensors have one
    checksum too: call it for each, with `first` where the one before has ended, and with the same `into`, an int64
    tensor of one element to which it adds.

    Works on the current stream of the device; the result is there once the stream has reached it. Raises LayoutError
    for runs that are not within `data`, KernelError for what fails on the device.
    """
    table = np.ascontiguousarray(runs, dtype=np.int64).reshape(-1, 2)
    outside = (table < 0).any(axis=1) | (table[:, 0] > data.numel()) | (table[:, 1] > data.numel() - table[:, 0])
    if outside.any():
        offset, size = table[outside][0].tolist()
        raise LayoutError(f"a run of {size} bytes at {offset} does not lie within {data.numel()} bytes")
    if first < 0:
        raise LayoutError(f"the first word has the negative index {first}")
    total = torch.zeros(1, dtype=torch.int64, device=data.device) if into is None else into
    if total.device != data.device:
        raise LayoutError(f"checksum_runs was given data on {data.device} and a sum on {total.device}")
    torch.ops.lmkv.checksum_runs(data, torch.from_numpy(table), first, total)
    return total


def reference(data: torch.Tensor, runs: torch.Tensor, first: int, total: torch.Tensor) -> None:
    """The op in torch; bit for bit what the kernels do."""
    pieces = [data[offset : offset + size] for offset, size in runs.tolist()]
    stream = torch.cat([*pieces, data.new_zeros(0)])
    words = torch.nn.functional.pad(stream, (0, -len(stream) % WORD_BYTES)).view(torch.int64)
    total += mix(words, torch.arange(len(words), device=data.device) + first).sum()


for _device in ("cpu", "cuda"):
    if _device not in loaded:
        torch.library.impl("lmkv::checksum_runs", _device, reference)
