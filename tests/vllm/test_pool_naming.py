"""Which requests have names in the pool, asked with vLLM's own requests."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lmkv.hashing import Chain
from lmkv.vllm.pooled import adapters
from lmkv.vllm.pooled.adapters import Adapters
from lmkv.vllm.pooled.naming import exclusion, request_extras

from .real_vllm import LoRARequest, Request, SamplingParams

pytestmark = pytest.mark.timeout(600)  # importing vLLM and its first configuration may take a minute and more

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


# --- adapters ---


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter that is older than the process."""
    monkeypatch.setattr(adapters, "process_start_s", lambda: time.time() + 60)
    monkeypatch.setattr(adapters, "default_cache", lambda environ: tmp_path / "cache")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def lora(path: Path, number: int = 1, **more: Any) -> LoRARequest:
    return LoRARequest(f"judge{number}", number, str(path), **more)


def content(known: Adapters, request: LoRARequest) -> bytes:
    """Its content, once it has been read."""
    until_s = time.monotonic() + 20
    while (found := known.content(request)) is None:
        assert time.monotonic() < until_s
        time.sleep(0.001)
    return found


def test_the_same_adapter_has_the_same_content_on_every_engine(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    assert content(Adapters(), lora(adapter)) == content(Adapters(), lora(copy, 2))
    (copy / "adapter_config.json").write_text('{"r": 8}')
    assert content(Adapters(), lora(adapter)) != content(Adapters(), lora(copy, 2))
    assert content(Adapters("other LoRA settings"), lora(adapter)) != content(Adapters(), lora(adapter))


def test_an_adapter_that_is_loaded_again_in_place_is_another(adapter: Path) -> None:
    """vLLM keeps the id and the path (`load_inplace`): only the files tell."""
    known = Adapters()
    before = content(known, lora(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"weightz")
    assert known.content(lora(adapter, load_inplace=True)) is None, "never the old content, not even once"
    assert content(known, lora(adapter, load_inplace=True)) != before


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_newer_than_the_engine_is_its_own(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    ours, theirs = Adapters(), Adapters()
    assert content(ours, lora(adapter)) == content(theirs, lora(adapter))
    limit_s = (adapter / file).stat().st_ctime
    monkeypatch.setattr(adapters, "process_start_s", lambda: limit_s)
    ours, theirs = Adapters(), Adapters()
    first = content(ours, lora(adapter))
    assert first != content(theirs, lora(adapter)) and first != content(ours, lora(adapter, 2))
    ours.forget("1")
    assert content(ours, lora(adapter)) != first


@pytest.mark.parametrize("missing", ["folder", "weights"])
def test_an_adapter_that_cannot_be_read_is_told_once(
    adapter: Path, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    known = Adapters()
    if missing == "folder":
        shutil.rmtree(adapter)
    else:
        (adapter / "adapter_model.safetensors").unlink()
    until_s = time.monotonic() + 20
    while not caplog.records:
        assert known.content(lora(adapter)) is None and time.monotonic() < until_s
    assert [known.content(lora(adapter)) for _ in range(20)] == [None] * 20
    assert len(caplog.records) == 1 and "'judge1' has no name" in caplog.text


def test_adapters_are_forgotten_in_the_end(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_MOST", 3)
    known = Adapters()
    for number in range(1, 9):
        content(known, lora(adapter, number))
    assert len(known._known) == 3


def test_a_reset_is_part_of_every_name() -> None:
    known, request = Adapters(), Request("r", list(range(300)), SamplingParams(max_tokens=1), None)
    assert request_extras(request, known) == ()
    known.forget("")
    assert request_extras(request, known) == ()
    known.forget("1")
    first = request_extras(request, known)
    known.forget("2")
    assert first and request_extras(request, known) not in ((), first)
