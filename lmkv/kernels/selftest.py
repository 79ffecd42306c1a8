"""Proves a build: every op on every device here against the oracle."""

from __future__ import annotations

import logging

import numpy as np
import torch

from lmkv import codec_oracle, oracle
from lmkv.codec import CODECS, coded_pages
from lmkv.errors import LayoutError
from lmkv.layout import Geometry, canonical_pages, segments, vllm_cache
from lmkv.rope import Rope

from .cache import Cache
from .checksum import checksum_runs
from .codec import decode_pages, encode_pages
from .ops import convert_blocks, loaded, pack_pages, unpack_pages
from .rotate import rotate_keys

logger = logging.getLogger(__name__)

OPS = "convert_blocks, pack_pages, unpack_pages, rotate_keys, encode_pages, decode_pages, checksum_runs"


def _cases() -> list[tuple[Geometry, Geometry]]:
    def cache(order: str, n: int, interior: str = "plain", heads: int = 4, first: int = 0) -> Geometry:
        return vllm_cache(
            order,
            layers=3,
            blocks=256 // n + 1,
            heads=heads,
            block_tokens=n,
            parts=(32, 32),
            interior=interior,
            first_head=first,
            total_heads=4,
        )

    return [
        (cache("LBNHC", 16), cache("LBHNC", 64)),
        (cache("LBHNC", 128, "vec"), cache("LBHNC", 32, "amx")),
        (cache("BLHNC", 32), cache("LBHNC", 32, heads=2, first=2)),
    ]


def devices() -> list[str]:
    """Those that torch sees here."""
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def selftest() -> list[str]:
    """What was proved, a line each. Raises LayoutError naming the first op that is wrong."""
    lines = []
    for device in devices():
        for source, target in _cases():
            _prove(source, target, device)
        _prove_rotation(device)
        for codec in CODECS:
            _prove_coding(codec, device)
        _prove_checksum(device)
        how = f"compiled, {loaded[device]}" if device in loaded else "reference in torch (nothing compiled is loaded)"
        lines.append(f"{device}: {OPS} agree with the oracle · {how}")
    return lines


def _prove(source: Geometry, target: Geometry, device: str) -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, source.span_bytes(), dtype=np.uint8)
    tokens = 200
    table = segments(source, target, np.arange(source.blocks), np.arange(target.blocks), (5, tokens))
    wanted = np.zeros(target.span_bytes(), dtype=np.uint8)
    oracle.convert(oracle.Place.of(data, source), oracle.Place.of(wanted, target), table)
    there = Cache.of(torch.from_numpy(data).to(device), source)
    here = Cache.empty(target, device)
    convert_blocks(there, here, table)
    _same("convert_blocks", device, here.data, wanted, source, target)

    page = canonical_pages(source, page_tokens=256)
    into = segments(source, page, np.arange(source.blocks), [0], (5, tokens))
    pages = Cache.empty(page, device)
    packed = np.zeros(page.span_bytes(), dtype=np.uint8)
    oracle.convert(oracle.Place.of(data, source), oracle.Place.of(packed, page), into)
    sums = pack_pages(there, pages, into)
    _same("pack_pages", device, pages.data, packed, source, page)
    if sums.cpu().numpy().view(np.uint64)[0] != oracle.page_sums(oracle.Place.of(packed, page), into)[0]:
        raise LayoutError(f"pack_pages on {device}: wrong checksum for {source}")

    back = segments(page, target, [0], np.arange(target.blocks), (5, tokens))
    here = Cache.empty(target, device)
    unpack_pages(pages, here, back)
    _same("unpack_pages", device, here.data, wanted, page, target)


def _prove_rotation(device: str) -> None:
    rng = np.random.default_rng(2)
    for g, _ in _cases():
        data = oracle.from_float(rng.standard_normal(g.span_bytes() // g.width).astype(np.float32), g.dtype).ravel()
        runs, offsets = np.array([[1, 3, 9], [0, 0, 16]], dtype=np.int32), np.array([-7, 100_000])
        rope = Rope(np.array([1, 0.1, 0.01, 0.001], dtype=np.float32), first=8)
        here = Cache.of(torch.from_numpy(data.copy()).to(device), g)
        oracle.rotate(oracle.Place.of(data, g), runs, offsets, rope)
        rotate_keys(here, runs, offsets, rope)
        _same("rotate_keys", device, here.data, data, g, g)


def _prove_coding(codec: str, device: str) -> None:
    page = canonical_pages(_cases()[0][0], page_tokens=32, pages=2)
    coded = coded_pages(page)
    data = np.random.default_rng(3).integers(0, 256, page.span_bytes(), dtype=np.uint8)
    wanted, moves = np.zeros(coded.span_bytes(), dtype=np.uint8), np.array([[0, 1], [1, 0]], dtype=np.int32)
    codec_oracle.encode(oracle.Place.of(data, page), oracle.Place.of(wanted, coded), moves, codec)
    there, here = Cache.of(torch.from_numpy(data).to(device), page), Cache.empty(coded, device)
    encode_pages(there, here, codec, moves)
    _same(f"encode_pages ({codec})", device, here.data, wanted, page, coded)

    codec_oracle.decode(oracle.Place.of(wanted, coded), oracle.Place.of(data, page), moves, codec)
    decode_pages(here, there, codec, moves)
    _same(f"decode_pages ({codec})", device, there.data, data, coded, page)


def _prove_checksum(device: str) -> None:
    data = np.random.default_rng(4).integers(0, 256, 100_000, dtype=np.uint8)
    for runs in ([[64, 16 << 10], [0, 64], [32 << 10, 48 << 10]], [[3, 21], [90_000, 1], [1000, 9001]]):
        table = np.array(runs, dtype=np.int64)
        found = checksum_runs(torch.from_numpy(data).to(device), table)
        if found.cpu().numpy().view(np.uint64)[0] != oracle.runs_sum(data, table):
            raise LayoutError(f"checksum_runs on {device} is wrong for the runs {runs}")


def _same(op: str, device: str, got: torch.Tensor, wanted: np.ndarray, source: Geometry, target: Geometry) -> None:
    if not np.array_equal(got.cpu().numpy(), wanted):
        raise LayoutError(
            f"{op} on {device} is wrong from {source} to {target}", hint="rebuild: pip install --force-reinstall lmkv"
        )
