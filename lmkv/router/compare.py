"""Judging two computations of one prompt by the logprobs of their first token. Pure.

Two correct computations of one prompt differ, because the shape of a batch decides in which order numbers are added,
and one of the two takes a part of the prompt from the cache. Each layer rounds to the model's dtype, and in most
models the largest logits lie between 16 and 32, where one unit in the last place is 2e-6 in float32, 0.016 in float16
and 0.125 in bfloat16. The errors of many layers add up to a few such units (seen with SmolLM2 in bfloat16: 0.15 to
0.23). The tolerances are 8 units in bfloat16, 16 in float16, and in float32 far more than any rounding. Caches of 8
bits or fewer lose more in each key and value than bfloat16 does in an activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from .bodies import Kind

TOLERANCES = {"float32": 0.01, "float16": 0.25, "bfloat16": 1.0}
"""By the name of the model's dtype; nats."""
WIDEST_TOLERANCE = 2.0
"""For caches of fewer than 16 bits, and for what is not in the table."""
_SIXTEEN_BITS_AND_MORE = frozenset({"auto", "float32", "float16", "half", "bfloat16"})


class UnreadableError(ValueError):
    """A probe's answer lacks something, or has another form than vLLM's."""


@dataclass(frozen=True, slots=True)
class Found:
    """One probe's answer. `logprobs`: natural logarithms by `token_id:N`, of the likeliest tokens."""

    token: str
    logprobs: Mapping[str, float]
    cached_tokens: int
    prompt: str
    """Digest of the prompt."""
    dtype: str
    kv_dtype: str

    def top(self) -> list[list[Any]]:
        """[token, logprob], the likeliest first; for the ledger and the log."""
        return [[token, round(value, 4)] for token, value in sorted(self.logprobs.items(), key=lambda p: -p[1])]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the engine's ledger says it has loaded: tokens [lo, hi) of the prompt, and from where."""

    lo: int
    hi: int
    pushed: Mapping[str, Any] | None
    """From a prefill engine: its incarnation under `incarnation`."""
    pool: Mapping[str, Any] | None
    """From the pool: `namespace` and `nodes`."""


def loaded_of(ledger: Mapping[str, Any]) -> Loaded | None:
    """None: the engine computed the whole prompt, or had it. Raises UnreadableError."""
    try:
        spans, pushed, pool = [], None, ledger.get("pool")
        if ledger.get("outcome") == "loaded" and not str(ledger.get("miss", "")).startswith("load_failed"):
            spans.append((int(ledger["first_token"]), int(ledger["prompt_tokens"])))
            pushed = {"incarnation": ledger.get("peer", ""), "mode": ledger.get("mode", "")}
        if pool is not None:
            spans.append((int(pool["tokens"][0]), int(pool["tokens"][1])))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(f"the engine's ledger has another form than expected: {error!r}") from error
    if not spans:
        return None
    return Loaded(min(lo for lo, _ in spans), max(hi for _, hi in spans), pushed, pool)


def read_probe(kind: Kind, body: bytes) -> Found:
    """Raises UnreadableError."""
    try:
        told = msgspec.json.decode(body)
        probe = told["kv_transfer_params"]["lmkv"]["probe"]
        logprobs = told["choices"][0]["logprobs"]
        if kind is Kind.CHAT:
            first = logprobs["content"][0]
            token, likely = first["token"], {each["token"]: float(each["logprob"]) for each in first["top_logprobs"]}
        else:
            token, likely = logprobs["tokens"][0], {k: float(v) for k, v in logprobs["top_logprobs"][0].items()}
        if not likely:
            raise UnreadableError("the engine told no logprobs")
        words = str(probe["prompt"]), str(probe["dtype"]), str(probe["kv_dtype"])
        return Found(str(token), likely, int(probe["cached_tokens"]), *words)
    except UnreadableError:
        raise
    except (msgspec.DecodeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(f"the engine's answer to a probe has another form than expected: {error!r}") from error


def difference(one: Found, other: Found) -> float:
    """The largest difference of a token's logprob that the two answers prove, in nats.

    A token that is among the likeliest of one answer only has, in the other, at most the logprob of the least likely
    that is told there.
    """
    largest = 0.0
    for ours, theirs in ((one.logprobs, other.logprobs), (other.logprobs, one.logprobs)):
        least = min(theirs.values())
        for token, value in ours.items():
            gap = abs(value - theirs[token]) if token in theirs else max(0.0, value - least)
            largest = max(largest, gap)
    return largest


def tolerance_for(dtype: str, kv_dtype: str) -> float:
    """Nats. `dtype` and `kv_dtype` as vLLM names them, such as `torch.bfloat16` and `fp8_e4m3`."""
    if kv_dtype.removeprefix("torch.") not in _SIXTEEN_BITS_AND_MORE:
        return WIDEST_TOLERANCE
    by_model = TOLERANCES.get(dtype.removeprefix("torch."), WIDEST_TOLERANCE)
    by_cache = TOLERANCES.get(kv_dtype.removeprefix("torch."), 0.0)
    return max(by_model, by_cache)
