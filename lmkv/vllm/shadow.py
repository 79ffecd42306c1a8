"""An engine's part in shadow checks: what it loaded for a request, and what a probe found in the prefix cache.

The router recomputes a share of the requests whose KV was loaded (lmkv/router/shadow.py). It needs to know which
request loaded what (the ledger tells), and that its first probe really read the loaded KV (the probe's reply tells).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from typing import Any

from lmkv.ids import RequestId

from .params import is_probe
from .specs import LoadSpec


class Probes:
    """The probes that this engine is computing. Engine thread only. `dtype` and `kv_dtype` as vLLM writes them."""

    def __init__(self, dtype: str, kv_dtype: str) -> None:
        self._dtype = dtype
        self._kv_dtype = kv_dtype
        self._cached: dict[RequestId, int] = {}
        """The smallest number of tokens that the prefix cache had for a probe; ended by `reply`."""

    def scheduled(self, request: Any, cached_tokens: int) -> None:
        """vLLM found the first `cached_tokens` tokens of a request in its prefix cache. A preempted request comes again
        and may then find what it has computed itself, hence the smallest number counts."""
        if is_probe(request.kv_transfer_params):
            self._cached[request.request_id] = min(cached_tokens, self._cached.get(request.request_id, cached_tokens))

    def reply(self, request: Any) -> dict[str, Any] | None:
        """`kv_transfer_params` of the response to a probe that has ended; None for any other request."""
        cached_tokens = self._cached.pop(request.request_id, None)
        if cached_tokens is None:
            return None
        found = {
            "cached_tokens": cached_tokens,
            "prompt": prompt_digest(request),
            "dtype": self._dtype,
            "kv_dtype": self._kv_dtype,
        }
        return {"lmkv": {"probe": found}}


def prompt_digest(request: Any) -> str:
    """32 hex digits over everything that a probe's prompt consists of: tokens, and identifiers of images and the like.

    Two probes of one request may differ: a chat template prints the time, an image behind a URL is replaced.
    """
    digest = hashlib.blake2b(array("q", request.prompt_token_ids or ()).tobytes(), digest_size=16)
    for feature in request.mm_features or ():
        digest.update(f"{feature.modality}:{feature.identifier}:{feature.mm_position.offset};".encode())
    return digest.hexdigest()


def pool_source(spec: LoadSpec, good: int) -> Mapping[str, Any]:
    """Where KV came from that was loaded from the pool, for the ledger: tokens [lo, `good`), and for each node its
    first and last page. A page's key covers all tokens before it, too."""
    nodes: dict[str, dict[str, Any]] = {}
    for page in spec.pages:
        told = nodes.setdefault(page.node, {"first_chunk": page.chunk, "first_key": page.key.hex(), "pages": 0})
        told |= {"last_chunk": page.chunk, "last_key": page.key.hex(), "pages": told["pages"] + 1}
    return {"tokens": [spec.tokens[0], good], "namespace": spec.namespace.hex(), "nodes": nodes}
