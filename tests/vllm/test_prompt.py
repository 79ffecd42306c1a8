"""The digest that binds a transfer to its prompt, over vLLM's own Request objects."""

from __future__ import annotations

import hashlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkv.transfer.prompt import Prompt
from lmkv.vllm.prompt import DIGEST_BYTES, prompt_digest, prompt_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, while vLLM is imported
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

IDS = [1, 5, 70_000, 2, 9, 9, 4, 8]
SOME = torch.arange(16, dtype=torch.float32).reshape(8, 2)


class Contents:
    """Stands for Adapters: what each adapter's files contain, by name; None while they are being read."""

    def __init__(self, since_reset: bytes = b"", **known: bytes | None) -> None:
        self.known = known
        self.since_reset = since_reset

    def content(self, lora: Any) -> bytes | None:
        return self.known[lora.lora_name]


def lora(name: str) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=1, lora_path=f"/{name}")


def image(content: str, offset: int = 2, length: int = 3, modality: str = "image") -> MultiModalFeatureSpec:
    """Under vLLM's own identifier, a hash."""
    identifier = hashlib.sha256(content.encode()).hexdigest()
    return MultiModalFeatureSpec(None, modality, identifier, PlaceholderRange(offset, length))


def request(ids: list[int] | None = IDS, **more: Any) -> Request:
    return Request("r", ids, SamplingParams(max_tokens=1), None, **more)


def digest(made: Request, **known: bytes | None) -> bytes | None:
    return prompt_digest(made, Contents(**known))  # type: ignore[arg-type]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another token": {"ids": [*IDS[:-1], 7]},
    "another order": {"ids": IDS[::-1]},
    "shorter": {"ids": IDS[:-1]},
    "ids that differ above 16 bits": {"ids": [1, 5, 70_000 + (1 << 16), *IDS[3:]]},
    "salt": {"cache_salt": "s"},
    "image": {"mm_features": [image("a")]},
    "another image": {"mm_features": [image("b")]},
    "image elsewhere": {"mm_features": [image("a", offset=3)]},
    "longer image": {"mm_features": [image("a", length=4)]},
    "the image as video": {"mm_features": [image("a", modality="video")]},
    "two images": {"mm_features": [image("a"), image("b", offset=6)]},
    "two images, exchanged": {"mm_features": [image("b"), image("a", offset=6)]},
    "adapter": {"lora_request": lora("one")},
    "another adapter": {"lora_request": lora("two")},
    "embeddings": {"ids": None, "prompt_embeds": SOME},
    "other embeddings": {"ids": None, "prompt_embeds": SOME + 1},
    "embeddings of another shape": {"ids": None, "prompt_embeds": SOME.reshape(4, 4)},
    "embeddings as integers": {"ids": None, "prompt_embeds": SOME.view(torch.int32)},
    "embeddings in bfloat16": {"ids": None, "prompt_embeds": SOME.to(torch.bfloat16)},
    "embeddings in float16": {"ids": None, "prompt_embeds": SOME.to(torch.float16)},
    "mixed": {"prompt_embeds": SOME, "prompt_is_token_ids": [True] * 4 + [False] * 4},
    "mixed otherwise": {"prompt_embeds": SOME, "prompt_is_token_ids": [False] * 4 + [True] * 4},
}


def test_whatever_the_kv_depends_on_changes_the_digest() -> None:
    known = {"one": b"content 1", "two": b"content 2"}
    found = {name: digest(request(**more), **known) for name, more in VARIANTS.items()}
    again = {name: digest(request(**more), **known) for name, more in VARIANTS.items()}
    assert found == again, "the same request gives the same digest"
    assert all(value is not None and len(value) == DIGEST_BYTES for value in found.values())
    assert len(set(found.values())) == len(VARIANTS), "each differs from all others"


def test_an_adapter_is_its_content_not_its_name() -> None:
    first = digest(request(lora_request=lora("one")), one=b"x")
    assert first == digest(request(lora_request=lora("two")), two=b"x")
    assert first != digest(request(lora_request=lora("one")), one=b"y")


def test_an_adapter_that_is_still_read_is_never_equal() -> None:
    made = request(lora_request=lora("one"))
    assert digest(made, one=None) is None
    unknown = prompt_of(made, Contents(one=None))  # type: ignore[arg-type]
    assert unknown == Prompt(b"", len(IDS)) and unknown.differs(unknown)


def test_strided_embeddings_are_read_in_their_order() -> None:
    wide = torch.cat([SOME, SOME + 50], dim=1)
    strided = wide[:, :2]
    assert not strided.is_contiguous()
    assert digest(request(None, prompt_embeds=strided)) == digest(request(None, prompt_embeds=SOME))


@pytest.mark.parametrize("count", [0, 1, 100_000])
def test_any_length(count: int) -> None:
    assert prompt_of(request(list(range(count))), Contents()).tokens == count  # type: ignore[arg-type]


def test_an_image_under_an_id_of_the_clients_own_has_no_content() -> None:
    """Each engine fetches it for itself, and what is behind its address may have changed."""
    feature = MultiModalFeatureSpec(None, "image", "my-cat", PlaceholderRange(2, 3))
    assert digest(request(mm_features=[image("a"), feature])) is None
    prompt = prompt_of(request(mm_features=[feature]), Contents())  # type: ignore[arg-type]
    assert "images under ids of the client's own" in prompt.differs(prompt)


def test_kv_from_before_and_after_a_reset_differs() -> None:
    """Of two engines whose weights are replaced one after the other, one may not have heard of the other's reset."""
    before, after, later = (prompt_digest(request(), Contents(r)) for r in (b"", b"1", b"2"))  # type: ignore[arg-type]
    assert len({before, after, later}) == 3
