"""Which requests have names in the pool, asked with vLLM's own requests."""

from __future__ import annotations

import pytest
import torch

from lmkv.hashing import Chain
from lmkv.vllm.pooled.adapters import Adapters
from lmkv.vllm.pooled.naming import exclusion, request_extras

from .real_vllm import Request, SamplingParams

TOKENS = 300


def embeds(dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def embeds_request(prompt: torch.Tensor, mask: list[bool] | None = None) -> Request:
    ids = None if mask is None else [7 if own else 0 for own in mask]
    return Request(
        "r", ids, SamplingParams(max_tokens=4), None, prompt_embeds=prompt, prompt_is_token_ids=mask, cache_salt=None
    )


def keys(request: Request) -> tuple[bytes, ...]:
    assert exclusion(request, False) == ""
    extras = request_extras(request, Adapters())
    assert extras is not None
    return tuple(Chain(b"n" * 16, 128, b"", extras).extend(request.all_token_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_embeddings_of_every_dtype_are_named(dtype: torch.dtype) -> None:
    """numpy knows no bfloat16, and an exception here would end the engine."""
    first = keys(embeds_request(embeds(dtype)))
    assert len(first) == TOKENS // 128
    assert keys(embeds_request(embeds(dtype))) == first
    assert not set(keys(embeds_request(embeds(dtype, 2)))) & set(first)


def test_dtype_shape_and_mask_are_part_of_what_embeddings_are() -> None:
    prompt = embeds(torch.bfloat16)
    same_bytes = [
        keys(embeds_request(prompt)),
        keys(embeds_request(prompt.view(torch.float16))),
        keys(embeds_request(prompt.reshape(TOKENS, 8, 2))),
        keys(embeds_request(prompt, [i % 2 == 0 for i in range(TOKENS)])),
        keys(embeds_request(prompt, [i % 3 == 0 for i in range(TOKENS)])),
    ]
    assert len(set(same_bytes)) == len(same_bytes)


def test_embeddings_that_do_not_lie_side_by_side() -> None:
    wide = torch.randn(TOKENS, 32).to(torch.bfloat16)
    assert keys(embeds_request(wide[:, ::2])) == keys(embeds_request(wide[:, ::2].contiguous()))


def test_a_request_goes_on_from_embeddings_to_tokens() -> None:
    request = embeds_request(embeds(torch.bfloat16))
    before = keys(request)
    request.append_output_token_ids(list(range(1, 128)))
    assert keys(request)[: len(before)] == before and len(keys(request)) == (TOKENS + 127) // 128
