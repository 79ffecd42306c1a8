"""Which requests have names in the pool, and what else than tokens is in the name."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from lmkv.hashing import Extra

from ..contents import is_content_hash
from .adapters import Adapters


def exclusion(request: Any, approximate: bool) -> str:
    """Why the request neither loads from the pool nor stores, or ""."""
    if approximate:
        return "approximate"
    if request.pooling_params is not None:
        return "pooling"
    if request.prompt_token_ids is None and request.prompt_embeds is None:
        return "no_tokens"
    if getattr(request, "resumable", False):
        return "resumable"
    if any(not is_content_hash(feature.identifier) for feature in request.mm_features or ()):
        return "mm_uuid"
    return ""


def request_extras(request: Any, adapters: Adapters) -> tuple[Extra, ...] | None:
    """All that the KV of a request depends on besides its token ids, its salt and the engine's fingerprint: adapter,
    images with their places, embeddings, and whether the engine has been reset.

    Equal extras on two engines mean equal KV for equal tokens. None: one of them is not known (yet). Engine thread.
    """
    extras = [Extra(0, 0, b"reset:" + adapters.since_reset)] if adapters.since_reset else []
    if request.lora_request is not None:
        content = adapters.content(request.lora_request)
        if content is None:
            return None
        extras.append(Extra(0, 0, b"lora:" + content))
    for feature in request.mm_features or ():
        place = feature.mm_position
        content = f"mm:{feature.modality}:{feature.identifier}".encode()
        extras.append(Extra(place.offset, place.offset + place.length, content))
    if request.prompt_embeds is not None:
        extras.append(Extra(0, 0, b"embeds:" + _embeds_digest(request)))
    return tuple(extras)


def _embeds_digest(request: Any) -> bytes:
    """16 bytes over the prompt's embeddings ([tokens, hidden], any dtype), and over which tokens they stand for."""
    embeds, mask = request.prompt_embeds, request.prompt_is_token_ids
    state = hashlib.blake2b(f"{embeds.dtype}:{tuple(embeds.shape)}:".encode(), digest_size=16)
    # Raw bytes, because numpy has no bfloat16.
    state.update(embeds.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    if mask is not None:
        state.update(bytes(mask))
    return state.digest()
