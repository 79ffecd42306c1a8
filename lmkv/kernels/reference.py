"""The ops in torch, for machines without a compiled library. Slow and simple: index tensors over all elements.

Bit for bit what the kernels do; tests compare all of them with lmkv/oracle.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmkv.layout import PartMap
from lmkv.oracle import WORD_KEY, WORD_PRIME

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.uint8, torch.uint8)
"""By type index; what is not a float is copied as bytes."""
_FIELDS = 9


def register(keys: Sequence[str]) -> None:
    """Implement the ops for these dispatch keys (devices)."""
    for key in keys:
        torch.library.impl("lmkv::convert_blocks", key.lower(), convert_blocks)
        torch.library.impl("lmkv::pack_pages", key.lower(), pack_pages)
        torch.library.impl("lmkv::unpack_pages", key.lower(), unpack_pages)


def convert_blocks(
    source: torch.Tensor,
    source_layers: torch.Tensor,
    source_map: Sequence[int],
    target: torch.Tensor,
    target_layers: torch.Tensor,
    target_map: Sequence[int],
    segments: torch.Tensor,
    shape: Sequence[int],
    source_type: int,
    target_type: int,
) -> None:
    parts, *dims = shape[:3]
    heads = torch.arange(shape[3], device=source.device)
    from_type, to_type = DTYPES[source_type], DTYPES[target_type]
    block_s, token_s, block_t, token_t = _tokens(segments.to(source.device))
    for part in range(parts):
        d = torch.arange(dims[part], device=source.device)
        at_s = elements(part_map(source_map, part), block_s, heads + shape[4], token_s, d)
        at_t = elements(part_map(target_map, part), block_t, heads + shape[5], token_t, d)
        for layer_s, layer_t in zip(source_layers.tolist(), target_layers.tolist(), strict=True):
            values = elements_of(source, layer_s, from_type)[at_s]
            elements_of(target, layer_t, to_type)[at_t] = _cast(values, to_type)


def _cast(values: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    """Torch makes one NaN of all; here they keep their sign and the upper bits of their payload."""
    if values.dtype == to:
        return values
    out = values.to(to)
    raw = values[values.isnan()]
    if raw.numel() == 0:
        return out
    wide = raw.view(torch.int32 if raw.dtype.itemsize == 4 else torch.int16).to(torch.int64)
    if raw.dtype == torch.bfloat16:
        wide <<= 16
    elif raw.dtype == torch.float16:
        wide = (wide & 0x8000) << 16 | 0x7F800000 | (wide & 0x3FF) << 13
    if to == torch.bfloat16:
        bits = (wide >> 16 | 0x40).to(torch.int16)
    elif to == torch.float16:
        bits = (wide >> 16 & 0x8000 | 0x7E00 | wide >> 13 & 0x3FF).to(torch.int16)
    else:
        bits = wide.to(torch.int32)
    out.view(bits.dtype)[values.isnan()] = bits  # as integers: torch may go through a number and lose the payload
    return out


def pack_pages(*call: Any) -> None:
    """The target is pages; their rows are summed."""
    source, sums, segments, shape, page, target_type = call[0], *call[6:10], call[11]
    convert_blocks(*(*call[:6], segments, shape, *call[10:]))
    blocks, tokens = _tokens(segments.to(source.device))[2:]
    pages, layers, fields = call[3:6]
    _add_sums(pages, layers, fields, sums, blocks, tokens, shape, shape[5], page, DTYPES[target_type])


def unpack_pages(*call: Any) -> None:
    """The source is pages; their rows are summed."""
    source, sums, segments, shape, page, source_type = call[0], *call[6:10], call[10]
    convert_blocks(*(*call[:6], segments, shape, *call[10:]))
    blocks, tokens = _tokens(segments.to(source.device))[:2]
    pages, layers, fields = call[:3]
    _add_sums(pages, layers, fields, sums, blocks, tokens, shape, shape[4], page, DTYPES[source_type])


def part_map(fields: Sequence[int], part: int) -> PartMap:
    return PartMap(*fields[part * _FIELDS : (part + 1) * _FIELDS])


def _tokens(segments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Source block, source token, target block, target token of every single token."""
    table = segments.to(torch.int64)
    counts = table[:, 4]
    total = int(counts.sum())
    within = torch.arange(total, device=table.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    columns = [table[:, i].repeat_interleave(counts) for i in range(4)]
    return columns[0], columns[1] + within, columns[2], columns[3] + within


def elements(m: PartMap, b: torch.Tensor, h: torch.Tensor, n: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, dims) element offsets within a layer."""
    token = m.block * b + m.n1 * (n >> m.tn) + m.n0 * (n & ((1 << m.tn) - 1))
    dim = m.d1 * (d >> m.td) + m.d0 * (d & ((1 << m.td) - 1))
    return m.offset + token[:, None, None] + (m.head * h)[None, :, None] + dim[None, None, :]


def elements_of(data: torch.Tensor, layer_offset: int, dtype: torch.dtype) -> torch.Tensor:
    usable = (data.numel() - layer_offset) // dtype.itemsize * dtype.itemsize
    return data[layer_offset : layer_offset + usable].view(dtype)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To nearest even. NaNs become one bit pattern, whatever torch makes of them on this machine."""
    return torch.where(x.isnan(), torch.tensor(torch.nan, dtype=dtype, device=x.device), x.to(dtype))


def _add_sums(
    data: torch.Tensor,
    layers: torch.Tensor,
    fields: Sequence[int],
    sums: torch.Tensor,
    blocks: torch.Tensor,
    tokens: torch.Tensor,
    shape: Sequence[int],
    first_head: int,
    page: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """As lmkv/oracle.page_sums."""
    parts, *dims = shape[:3]
    page_head, page_layer, model_layers, page_tokens = page
    words = -(-max(dims) * dtype.itemsize // 8)
    heads = torch.arange(shape[3], device=data.device)
    word = torch.arange(words, device=data.device)
    for part in range(parts):
        at = elements(
            part_map(fields, part), blocks, heads + first_head, tokens, torch.arange(dims[part], device=data.device)
        )
        used = -(-dims[part] * dtype.itemsize // 8)
        for i, offset in enumerate(layers.tolist()):
            rows = elements_of(data, offset, dtype)[at].contiguous().view(torch.uint8)
            padded = torch.nn.functional.pad(rows, (0, used * 8 - rows.shape[-1])).view(torch.int64)
            row = ((page_head + heads) * model_layers + page_layer + i) * parts + part
            index = (row[None, :] * page_tokens + tokens[:, None]) * words
            mixed = mix(padded, index[:, :, None] + word[:used])
            sums.index_add_(0, blocks, mixed.sum(dim=(1, 2)))


def mix(word: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """int64 arithmetic wraps around as uint64's does; only the shift has to be made a logical one."""
    x = word ^ ((index + 1) * (WORD_KEY - (1 << 64)))
    x = x ^ ((x >> 32) & 0xFFFFFFFF)
    x = x * WORD_PRIME
    return x ^ ((x >> 32) & 0xFFFFFFFF)
