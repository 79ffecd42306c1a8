"""Names of KV: fixed vectors (a changed key is a lost pool), and what must and must not change a key."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.errors import ConfigError
from lmkv.hashing import Chain, Extra, Manifest, chain_root, chunk_key, free_key, group_shape, namespace_of, page_key
from lmkv.layout import canonical_pages, vllm_cache

MANIFEST = Manifest({"model": "LlamaForCausalLM:1", "dtype": "bfloat16"}, 128, ("bfloat16:2x4x128x64+64",))
SPACE = bytes.fromhex("82866341a53241af863fb30e257a3c64")
TOKENS = list(range(13))


class ConstantList(Sequence[int]):
    """As vLLM hands out token ids: a sequence that is no list."""

    def __init__(self, inner: list[int]) -> None:
        self._inner = inner

    def __getitem__(self, item: Any) -> Any:
        return self._inner[item]

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[int]:
        return iter(self._inner)


def keys(
    tokens: Sequence[int] = TOKENS, chunk: int = 4, salt: bytes = b"", extras: tuple[Extra, ...] = ()
) -> list[str]:
    return [key.hex() for key in Chain(SPACE, chunk, salt, extras).extend(tokens)]


# --- vectors ---


def test_vectors() -> None:
    assert MANIFEST.description() == (
        '{"chunk_tokens":128,"epoch":"","groups":["bfloat16:2x4x128x64+64"],'
        '"must":{"dtype":"bfloat16","model":"LlamaForCausalLM:1"},"page_version":1,"tenant":""}'
    )
    assert MANIFEST.namespace() == namespace_of(MANIFEST.description()) == SPACE
    root = chain_root(SPACE)
    assert root.hex() == "dbd98a372b587b9f03fa2cf389b0e099"
    assert chain_root(SPACE, b"salt").hex() == "88d02f7fec9d34a6086115378d4500af"
    first = chunk_key(root, range(128))
    assert first.hex() == "a14db5ca3495bf32ffb018cb099ef69d"
    assert chunk_key(first, range(128, 256), [b"lora"]).hex() == "669cb199e724a30332b4087b78fc721f"
    assert free_key(SPACE, range(128)).hex() == "b052502e24fbe6c96bbcc31e18e530cb"
    assert page_key(first, 3).hex() == "a14db5ca3495bf32ffb018cb099ef69d03"
    assert keys(salt=b"s", extras=(Extra(2, 7, b"image"),)) == [
        "c239a924f71c253cd44aef296c0a2113",
        "e2f49b3eacc387addc50e1ab36a756a3",
        "ab49f1463f616dbb0981487c2bfd344f",
    ]


def test_another_process_has_the_same_keys() -> None:
    code = (
        "from lmkv.hashing import *; m = Manifest({'dtype': 'bfloat16', 'model': 'LlamaForCausalLM:1'}, 128,"
        " ('bfloat16:2x4x128x64+64',)); print(Chain(m.namespace(), 4).extend(range(13))[-1].hex())"
    )
    for seed in ("0", "12345"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == keys()[-1]


@pytest.mark.parametrize(
    "container",
    [
        list,
        tuple,
        ConstantList,
        np.array,
        lambda t: np.array(t, dtype=np.int32),
        lambda t: np.array(t, dtype=np.uint64),
    ],
)
def test_the_container_of_tokens_does_not_matter(container: Any) -> None:
    assert keys(container(TOKENS)) == keys()
    assert free_key(SPACE, container(TOKENS)) == free_key(SPACE, TOKENS)


@pytest.mark.parametrize("bad", [[-1], [1 << 32], np.array([-1]), np.array([1 << 40]), [0.5], ["a"]])
def test_what_is_no_token_id_has_no_key(bad: Any) -> None:
    with pytest.raises(ConfigError, match="token ids are integers"):
        chunk_key(b"", bad)


# --- what changes a namespace ---


@pytest.mark.parametrize(
    "change",
    [
        {"must": {"model": "LlamaForCausalLM:2", "dtype": "bfloat16"}},
        {"must": {"model": "LlamaForCausalLM:1", "dtype": "float16"}},
        {"must": {"model": "LlamaForCausalLM:1", "dtype": "bfloat16", "rope": "x"}},
        {"must": {"model": "LlamaForCausalLM:1"}},
        {"chunk_tokens": 256},
        {"groups": ("float16:2x4x128x64+64",)},
        {"groups": ("bfloat16:2x4x128x64+64",) * 2},
        {"groups": ()},
        {"tenant": "other"},
        {"epoch": "1"},
        {"page_version": 2},
    ],
    ids=str,
)
def test_every_field_of_the_manifest_makes_another_namespace(change: dict[str, Any]) -> None:
    assert replace(MANIFEST, **change).namespace() != SPACE


def test_all_fields_are_tried() -> None:
    assert {"must", "chunk_tokens", "groups", "tenant", "epoch", "page_version"} == set(Manifest.__slots__)


def test_order_of_must_does_not_matter() -> None:
    turned = dict(reversed(list(MANIFEST.must.items())))
    assert replace(MANIFEST, must=turned).namespace() == SPACE


def test_tenant_and_epoch_are_not_confused() -> None:
    assert replace(MANIFEST, tenant="a").namespace() != replace(MANIFEST, epoch="a").namespace()


def test_the_shape_of_a_page_is_that_of_the_model_whoever_holds_a_share() -> None:
    shapes = set()
    for order, blocks, block_tokens, heads, first in [("LBHNC", 9, 16, 4, 0), ("BLNHC", 3, 128, 2, 2)]:
        share = vllm_cache(
            order,
            layers=2,
            blocks=blocks,
            heads=heads,
            block_tokens=block_tokens,
            parts=(64, 64),
            first_head=first,
            total_heads=4,
        )
        shapes.add(group_shape(canonical_pages(share, page_tokens=128)))
    assert shapes == {"bfloat16:2x4x128x64+64"}


# --- what changes a chunk's key ---


def test_only_full_chunks_have_keys_and_a_change_reaches_all_that_follow() -> None:
    assert len(keys()) == 3
    changed = keys([*TOKENS[:5], 99, *TOKENS[6:]])
    assert changed[0] == keys()[0]
    assert not set(changed[1:]) & set(keys())


def test_a_chunk_elsewhere_has_another_key_and_the_same_free_key() -> None:
    twice = TOKENS[:4] * 2
    first, second = keys(twice)
    assert first != second
    assert free_key(SPACE, twice[:4]) == free_key(SPACE, twice[4:])
    assert free_key(SPACE, twice[:4]) != free_key(bytes(16), twice[:4])


def test_salt_changes_all_keys() -> None:
    assert not set(keys(salt=b"s")) & set(keys())


def test_an_adapter_changes_all_keys() -> None:
    one, other = (keys(extras=(Extra(0, 0, name),)) for name in (b"lora 1", b"lora 2"))
    assert not set(one) & set(keys())
    assert not set(one) & set(other)


def test_an_image_changes_the_keys_from_its_chunk_on() -> None:
    plain, image = keys(), keys(extras=(Extra(5, 7, b"image"),))
    assert image[0] == plain[0]
    assert not set(image[1:]) & set(plain)


def test_the_same_image_at_another_offset_is_another_key() -> None:
    found = {keys(extras=(Extra(first, first + 2, b"image"),))[1] for first in (4, 5, 6, 7)}
    assert len(found) == 4


def test_an_image_over_a_border_is_in_both_chunks() -> None:
    other = Chain(SPACE, 4, extras=(Extra(2, 6, b"image 2"),))
    assert not set(keys(extras=(Extra(2, 6, b"image 1"),))) & {key.hex() for key in other.extend(TOKENS)}


def test_extras_are_not_taken_for_one_another() -> None:
    root = chain_root(SPACE)
    assert chunk_key(root, [1], [b"ab", b"c"]) != chunk_key(root, [1], [b"a", b"bc"])
    assert chunk_key(root, [1], [b"", b"a"]) != chunk_key(root, [1], [b"a", b""])


def test_groups_have_page_keys_of_their_own() -> None:
    assert len({page_key(bytes(16), group) for group in range(256)}) == 256


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_a_token_at_least(chunk: int) -> None:
    with pytest.raises(ConfigError, match="chunk_tokens"):
        Chain(SPACE, chunk)


# --- growing ---


@settings(deadline=None, database=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, (1 << 32) - 1), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    chunk=st.integers(1, 9),
    extras=st.lists(st.builds(Extra, st.integers(0, 60), st.integers(0, 60), st.binary(max_size=4)), max_size=3),
)
def test_growing_step_by_step_gives_the_keys_of_all_at_once(
    tokens: list[int], cuts: list[int], chunk: int, extras: list[Extra]
) -> None:
    whole = Chain(SPACE, chunk, b"x", extras).extend(tokens)
    growing = Chain(SPACE, chunk, b"x", extras)
    for cut in sorted(cuts):
        assert growing.extend(tokens[:cut]) == whole[: min(cut, len(tokens)) // chunk]
    assert growing.extend(tokens) == whole
    assert len(set(whole)) == len(whole) == len(tokens) // chunk
