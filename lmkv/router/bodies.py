"""What of a client's JSON body goes to which engine. Pure.

A body is cut into its top-level members and put together again; the bytes of a member's value are never touched, so
large integers, float spellings and escapes reach the engine as the client wrote them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from lmkv.ids import TransferId

from .replies import BadRequestError

Members = dict[str, msgspec.Raw]

_members_decoder = msgspec.json.Decoder(Members)
_prompts_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_encoder = msgspec.json.Encoder()

_FALSE = (b"false", b"null", b"0")

_PREFILL_DROPS = frozenset(
    {
        # how much and how often to sample: prefill samples one token, which nobody reads
        *("max_tokens", "max_completion_tokens", "min_tokens", "n", "best_of", "stop", "stop_token_ids"),
        # how the answer is sent
        *("stream", "stream_options", "echo", "return_token_ids", "return_prompt_text"),
        # what is told about sampled tokens
        *("logprobs", "top_logprobs", "logprob_token_ids"),
        # what only constrains sampling. `response_format` is kept: some chat templates render it into the prompt
        *("structured_outputs",),
        "kv_transfer_params",
    }
)
_PREFILL_DROP_PREFIX = "guided_"

_PROBE_DROPS = _PREFILL_DROPS | {
    # how to sample: a probe is greedy, and its logprobs are compared
    *("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "use_beam_search", "length_penalty"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "repetition_detection", "logit_bias"),
    *("allowed_token_ids", "bad_words", "ignore_eos", "watermarking", "thinking_token_budget"),
    # how the answer is sent, and who asks
    *("return_token_offsets", "stream_interval", "request_id", "session_id", "user", "priority"),
    *("return_mm_kwargs", "routed_experts_prompt_start", "ec_transfer_params"),
}
PROBE_LOGPROBS = 5


class Kind(StrEnum):
    """The two generation endpoints."""

    CHAT = "chat"
    COMPLETION = "completion"


class Side(StrEnum):
    """Value of `role` in kv_transfer_params.lmkv."""

    PREFILL = "prefill"
    DECODE = "decode"


def parse(body: bytes) -> Members:
    """Raises BadRequestError if `body` is not a JSON object or brings its own `kv_transfer_params.lmkv`."""
    try:
        members = _members_decoder.decode(body)
        own = _own_transfer_params(members)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body of {len(body)} bytes is not a JSON object: {error}") from error
    if "lmkv" in own:
        raise BadRequestError(
            "kv_transfer_params.lmkv is set by the router and was sent by the client",
            hint="remove it, or send the request to an engine directly",
            param="kv_transfer_params",
        )
    return members


def wants_stream(members: Members) -> bool:
    return _truthy(members, "stream")


def held_echoes(kind: Kind, members: Members) -> int:
    """Stream events after the role events that repeat the prompt instead of bringing a token (chat with `echo`)."""
    if kind is not Kind.CHAT or not _truthy(members, "echo"):
        return 0
    n = _value(members, "n")
    return n if isinstance(n, int) and n > 0 else 1


def why_aggregated(kind: Kind, members: Members) -> str | None:
    """Why one engine has to do this request alone, None if it is fit for a prefill and a decode engine.

    Whoever wants logprobs of the prompt needs its logits, so decode computes all of it anyway. With a negative
    `truncate_prompt_tokens` vLLM's cut depends on max_tokens, which prefill gets changed: the prompts would differ.
    """
    if _value(members, "prompt_logprobs") is not None:
        return "prompt_logprobs"
    if _truthy(members, "use_beam_search"):
        return "use_beam_search"
    if _truthy(members, "echo") and (kind is Kind.CHAT or _value(members, "logprobs") is not None):
        return "echo_logprobs"
    truncate = _value(members, "truncate_prompt_tokens")
    if isinstance(truncate, int) and truncate < 0:
        return "truncate_prompt_tokens"
    if kind is Kind.COMPLETION:
        if _value_bytes(members, "prompt_embeds") not in (b"null", b"[]"):
            return "prompt_embeds"
        if _is_batch(members):
            return "batch"
    return None


def prefill_body(members: Members, transfer_id: TransferId, decode_address: str) -> bytes:
    """One token, no stream, the same prompt."""
    kept = {
        name: value
        for name, value in members.items()
        if name not in _PREFILL_DROPS and not name.startswith(_PREFILL_DROP_PREFIX)
    }
    kept["max_tokens"] = msgspec.Raw(b"1")
    if "max_completion_tokens" in members:
        kept["max_completion_tokens"] = msgspec.Raw(b"1")
    kept["n"] = msgspec.Raw(b"1")
    kept["stream"] = msgspec.Raw(b"false")
    kept["kv_transfer_params"] = _transfer_params(members, transfer_id, Side.PREFILL, decode_address)
    return _encoder.encode(kept)


def decode_body(members: Members, transfer_id: TransferId, prefill_address: str) -> bytes:
    """The client's body with the transfer added."""
    return _encoder.encode(
        members | {"kv_transfer_params": _transfer_params(members, transfer_id, Side.DECODE, prefill_address)}
    )


def aggregated_body(members: Members, ledger_id: TransferId | None = None) -> bytes:
    """The client's body, put together anew so that no engine reads a repeated name differently than the router did.

    `ledger_id`: the engine is to note under this name what it loads for the request.
    """
    if ledger_id is None:
        return _encoder.encode(members)
    return _encoder.encode(members | {"kv_transfer_params": _with_lmkv(members, {"ledger": ledger_id})})


def probe_body(kind: Kind, members: Members, salt: str | None) -> bytes:
    """The client's prompt for one greedy token with its logprobs, which neither loads from the pool nor stores there.

    With a fresh `salt` nothing is in the prefix cache for it, so that all is computed; None keeps the client's own.
    """
    kept = {
        name: value
        for name, value in members.items()
        if name not in _PROBE_DROPS and not name.startswith(_PREFILL_DROP_PREFIX)
    }
    asked: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "stream": False, "return_tokens_as_token_ids": True}
    if kind is Kind.CHAT:
        asked |= {"logprobs": True, "top_logprobs": PROBE_LOGPROBS}
    else:
        asked |= {"logprobs": PROBE_LOGPROBS}
    if salt is not None:
        asked["cache_salt"] = salt
    kept |= {name: msgspec.Raw(_encoder.encode(value)) for name, value in asked.items()}
    kept["kv_transfer_params"] = _with_lmkv(members, {"probe": True, "approximate": True})
    return _encoder.encode(kept)


def _transfer_params(members: Members, transfer_id: TransferId, side: Side, peer_address: str) -> msgspec.Raw:
    lmkv = {"transfer_id": transfer_id, "role": side, "peer": {"address": peer_address}}
    return _with_lmkv(members, lmkv)


def _with_lmkv(members: Members, lmkv: dict[str, Any]) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode({**_own_transfer_params(members), "lmkv": lmkv}))


def _own_transfer_params(members: Members) -> Members:
    value = members.get("kv_transfer_params")
    if value is None or bytes(value) == b"null":
        return {}
    return _members_decoder.decode(value)


def _value_bytes(members: Members, name: str) -> bytes:
    return bytes(members.get(name, b"null"))


def _value(members: Members, name: str) -> Any:
    """The decoded value of a small member. Raises BadRequestError."""
    try:
        return msgspec.json.decode(_value_bytes(members, name))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the value of {name!r} cannot be read: {error}", param=name) from error


def _truthy(members: Members, name: str) -> bool:
    """Whatever is not clearly false counts as true: the engine decides what it means."""
    return _value_bytes(members, name) not in _FALSE


def _is_batch(members: Members) -> bool:
    """A list of several prompts; a list of token ids is one prompt, and is not decoded to find that out."""
    prompt = _value_bytes(members, "prompt")
    if not prompt.startswith(b"[") or prompt[1:].lstrip()[:1] not in (b'"', b"["):
        return False
    return len(_prompts_decoder.decode(prompt)) > 1
