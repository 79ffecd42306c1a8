"""What vLLM's scheduler output says of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmkv.ids import RequestId


def scheduled(output: Any) -> Iterator[tuple[RequestId, int]]:
    """(request, tokens computed before this step) of all requests of the step, new ones first."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
