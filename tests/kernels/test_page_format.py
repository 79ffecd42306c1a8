"""The test vectors of docs/page-format.md, and its formulas, against the ops and in their own words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lmkv.codec import CODEC_VERSION, CODECS, coded_pages
from lmkv.kernels import Cache, decode_pages, encode_pages, pack_pages
from lmkv.layout import PAGE_ALIGNMENT_BYTES, PAGE_VERSION, Geometry, canonical_pages, page_bytes, vllm_cache

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "page-format.md").read_text()
HEADS, LAYERS, TOKENS, DIMS = 2, 1, 2, 4
MASK = (1 << 64) - 1


def vectors() -> dict[str, bytes]:
    """By name; an unindented line ends with a colon and names the hexadecimal lines below it."""
    (block,) = re.findall(r"```vectors\n(.*?)```", DOCUMENT, re.DOTALL)
    found = re.findall(r"^(\S.*):\n((?:  [0-9a-f]+\n)+)", block, re.MULTILINE)
    return {name: bytes.fromhex("".join(lines.split())) for name, lines in found}


VECTORS = vectors()


def model() -> Geometry:
    return vllm_cache("LBHNC", layers=LAYERS, blocks=1, heads=HEADS, block_tokens=TOKENS, parts=(DIMS, DIMS))


def page() -> Geometry:
    return canonical_pages(model(), page_tokens=TOKENS)


def cache_of(data: bytes, g: Geometry) -> Cache:
    cache = Cache.empty(g)
    cache.data.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
    return cache


def checksum(data: bytes, heads: int, layers: int, tokens: int, dims: int, width: int, present: int) -> int:
    """As the document has it, for two parts of one size."""
    words, row, total = -(-width * dims // 8), width * dims, 0
    for h in range(heads):
        for layer in range(layers):
            for p in range(2):
                for n in range(present):
                    at = width * ((h * layers + layer) * tokens * 2 * dims + p * tokens * dims + n * dims)
                    padded = data[at : at + row] + bytes(words * 8 - row)
                    for i in range(words):
                        index = (((h * layers + layer) * 2 + p) * tokens + n) * words + i
                        x = int.from_bytes(padded[8 * i : 8 * i + 8], "little")
                        x ^= (index + 1) * 0x9E3779B97F4A7C15 & MASK
                        x ^= x >> 32
                        x = x * 0x9E3779B1 & MASK
                        total += x ^ (x >> 32)
    return total & MASK


def test_every_vector_is_there() -> None:
    names = {"page", "page checksum", "page checksum of token 0 alone"}
    names |= {f"{codec}{what}" for codec in CODECS for what in ("", " checksum", " decoded")}
    assert set(VECTORS) == names


def test_the_page_is_the_numbers_in_their_order() -> None:
    i = np.arange(32)
    numbers = (0.375 * (i + 1) * np.where(i % 3 == 1, -1, 1)).astype(np.float32)
    bits = numbers.view(np.uint32) >> 16  # they all fit into bfloat16 but for a half, which goes to even
    rest, odd = numbers.view(np.uint32) & 0xFFFF, bits & 1
    bits = bits + ((rest > 0x8000) | ((rest == 0x8000) & (odd == 1)))
    assert bits.astype("<u2").tobytes() == VECTORS["page"]
    assert len(VECTORS["page"]) == page_bytes(page()) == 2 * HEADS * LAYERS * TOKENS * (DIMS + DIMS)


def test_pack_pages_writes_the_page_and_its_checksum() -> None:
    """From an engine's cache in which the same numbers lie in another order."""
    raw = np.frombuffer(VECTORS["page"], dtype="<u2").reshape(HEADS, LAYERS, 2, TOKENS, DIMS)
    engine = cache_of(raw.transpose(1, 0, 3, 2, 4).tobytes(), model())
    for tokens, name in ((2, "page checksum"), (1, "page checksum of token 0 alone")):
        pages = Cache.empty(page())
        sums = pack_pages(engine, pages, np.array([[0, 0, 0, 0, tokens]], dtype=np.int32))
        assert int(sums[0]) & MASK == int.from_bytes(VECTORS[name], "big")
        if tokens == TOKENS:
            assert pages.data.numpy().tobytes() == VECTORS["page"]


@pytest.mark.parametrize(("tokens", "name"), [(2, "page checksum"), (1, "page checksum of token 0 alone")])
def test_checksums_follow_the_formula(tokens: int, name: str) -> None:
    found = checksum(VECTORS["page"], HEADS, LAYERS, TOKENS, DIMS, 2, tokens)
    assert found == int.from_bytes(VECTORS[name], "big")


@pytest.mark.parametrize("codec", CODECS)
def test_coded_pages(codec: str) -> None:
    coded, back = Cache.empty(coded_pages(page())), Cache.empty(page())
    encode_pages(cache_of(VECTORS["page"], page()), coded, codec)
    assert coded.data.numpy().tobytes() == VECTORS[codec]
    decode_pages(coded, back, codec)
    assert back.data.numpy().tobytes() == VECTORS[f"{codec} decoded"]


@pytest.mark.parametrize("codec", CODECS)
def test_coded_pages_are_summed_as_one_token_of_bytes(codec: str) -> None:
    g = coded_pages(page())
    wanted = int.from_bytes(VECTORS[f"{codec} checksum"], "big")
    area = TOKENS * DIMS + 4
    assert checksum(VECTORS[codec], HEADS, LAYERS, 1, area, 1, 1) == wanted
    sums = pack_pages(cache_of(VECTORS[codec], g), Cache.empty(g), np.array([[0, 0, 0, 0, 1]], dtype=np.int32))
    assert int(sums[0]) & MASK == wanted


def test_the_document_is_of_this_version() -> None:
    assert f"# Page format, version {PAGE_VERSION}\n" in DOCUMENT
    assert f"codec version {CODEC_VERSION}\n" in DOCUMENT
    assert f"a multiple of {PAGE_ALIGNMENT_BYTES} bytes" in DOCUMENT
