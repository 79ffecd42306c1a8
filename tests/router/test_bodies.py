"""Bodies are cut and joined without touching the bytes of a value."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.ids import TransferId
from lmkv.router import bodies
from lmkv.router.bodies import Kind
from lmkv.router.replies import BadRequestError

TID = TransferId("01a20c2a154d70d0b57ebb721e4618ea")
PEER = "tcp://127.0.0.1:18100"

# What a decode and re-encode would spoil: integers beyond 64 bits, float spellings, escapes, order, spacing in values.
DELICATE = {
    "seed": b"123456789012345678901234567890",
    "temperature": b"1.0000000000000000001",
    "top_p": b"9e-1",
    "logit_bias": b'{"50256": -1.0e2,  "1": 5}',
    "messages": '[{"role":"user","content":"\\u00e9 é \\ud83d\\ude00 😀 \\/ \\n"}]'.encode(),
    "n": b"3",
    "logprobs": b"true",
    "top_logprobs": b"5",
    "tools": b'[ {"type" : "function","function":{"name":"f","parameters":{"maximum":1E400}}} ]',
    "stop": b'["\\u0000","a"]',
}


def joined(members: dict[str, bytes]) -> bytes:
    return b"{" + b", ".join(json.dumps(k).encode() + b" : " + v + b" " for k, v in members.items()) + b"}"


def raw(body: bytes) -> dict[str, bytes]:
    return {name: bytes(value) for name, value in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items()}


def test_decode_body_keeps_every_byte_of_every_other_member() -> None:
    out = raw(bodies.decode_body(bodies.parse(joined(DELICATE)), TID, PEER))
    params = json.loads(out.pop("kv_transfer_params"))
    assert out == DELICATE
    assert list(out) == list(DELICATE)
    assert params == {"lmkv": {"transfer_id": TID, "role": "decode", "peer": {"address": PEER}}}


def test_aggregated_body_keeps_every_byte() -> None:
    assert raw(bodies.aggregated_body(bodies.parse(joined(DELICATE)))) == DELICATE


def test_prefill_body_has_the_same_prompt_and_one_token() -> None:
    asked = DELICATE | {
        "max_tokens": b"512",
        "max_completion_tokens": b"600",
        "min_tokens": b"5",
        "best_of": b"4",
        "stream": b"true",
        "stream_options": b'{"include_usage":true}',
        "stop_token_ids": b"[1,2]",
        "logprob_token_ids": b"[3]",
        "structured_outputs": b'{"choice":["a"]}',
        "guided_json": b"{}",
        "guided_regex": b'"a"',
        "return_token_ids": b"true",
    }
    prompt = {
        "tool_choice": b'"auto"',
        "chat_template": b'"{{ x }}"',
        "chat_template_kwargs": b'{"enable_thinking":false}',
        "add_generation_prompt": b"false",
        "continue_final_message": b"true",
        "documents": b'[{"title":"t","text":"x"}]',
        "add_special_tokens": b"true",
        "truncate_prompt_tokens": b"100",
        "truncation_side": b'"left"',
        "cache_salt": b'"salt"',
        "mm_processor_kwargs": b'{"a":1}',
        "media_io_kwargs": b'{"video":{"fps":2}}',
        "reasoning_effort": b'"low"',
        "include_reasoning": b"false",
        "response_format": b'{"type":"json_object"}',
        "priority": b"3",
        "vllm_xargs": b'{"a":1}',
        "something_new": b"[1.50]",
    }
    out = raw(bodies.prefill_body(bodies.parse(joined(asked | prompt)), TID, PEER))
    params = json.loads(out.pop("kv_transfer_params"))
    kept = {name: DELICATE[name] for name in ("seed", "temperature", "top_p", "logit_bias", "messages", "tools")}
    fixed = {"max_tokens": b"1", "max_completion_tokens": b"1", "n": b"1", "stream": b"false"}
    assert out == kept | prompt | fixed
    assert params == {"lmkv": {"transfer_id": TID, "role": "prefill", "peer": {"address": PEER}}}


def test_prefill_body_names_max_completion_tokens_only_if_the_client_did() -> None:
    out = raw(bodies.prefill_body(bodies.parse(b'{"prompt":"a"}'), TID, PEER))
    assert "max_completion_tokens" not in out
    assert out["max_tokens"] == b"1"


def test_other_transfer_params_of_the_client_are_kept() -> None:
    members = bodies.parse(b'{"prompt":"a","kv_transfer_params":{"other":{"x":1.50}}}')
    out = raw(bodies.decode_body(members, TID, PEER))
    assert out["kv_transfer_params"].startswith(b'{"other":{"x":1.50},"lmkv":')


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"a":1}x',
        b'{"a":NaN}',
        b'{"kv_transfer_params":{"lmkv":{"role":"decode"}}}',
        b'{"kv_transfer_params":{"lmkv":null}}',
        b'{"kv_transfer_params":{"\\u006cmkv":{}}}',
        b'{"kv_transfer_\\u0070arams":{"lmkv":{}}}',
        b'{"kv_transfer_params":7}',
        b'{"kv_transfer_params":{},"kv_transfer_params":{"lmkv":{}}}',
    ],
)
def test_refused_bodies(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        bodies.parse(body)


def test_a_repeated_name_is_sent_once() -> None:
    members = bodies.parse(b'{"n":1,"n":2,"kv_transfer_params":{"lmkv":{}},"kv_transfer_params":null}')
    assert bodies.decode_body(members, TID, PEER).count(b'"lmkv"') == 1
    assert bodies.aggregated_body(members) == b'{"n":2,"kv_transfer_params":null}'


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        # ordinary requests
        (Kind.CHAT, {"messages": []}, None),
        (Kind.CHAT, {"n": 3, "logprobs": True, "top_logprobs": 5}, None),
        (Kind.CHAT, {"prompt_logprobs": None, "use_beam_search": False, "echo": False}, None),
        (Kind.COMPLETION, {"prompt": "a", "echo": True}, None),
        (Kind.COMPLETION, {"prompt": "a", "logprobs": 3}, None),
        # one prompt, however it is written
        (Kind.COMPLETION, {"prompt": "[1]"}, None),
        (Kind.COMPLETION, {"prompt": ["a"]}, None),
        (Kind.COMPLETION, {"prompt": [1, 2, 3]}, None),
        (Kind.COMPLETION, {"prompt": [[1, 2, 3]]}, None),
        (Kind.COMPLETION, {"prompt": []}, None),
        (Kind.COMPLETION, {"prompt": None}, None),
        # several prompts
        (Kind.COMPLETION, {"prompt": ["a", "b"]}, "batch"),
        (Kind.COMPLETION, {"prompt": [[1], [2]]}, "batch"),
        (Kind.COMPLETION, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
        # logits of the prompt
        (Kind.CHAT, {"prompt_logprobs": 0}, "prompt_logprobs"),
        (Kind.COMPLETION, {"prompt_logprobs": 2}, "prompt_logprobs"),
        (Kind.COMPLETION, {"prompt": "a", "echo": True, "logprobs": 0}, "echo_logprobs"),
        (Kind.CHAT, {"echo": True}, "echo_logprobs"),
        # others
        (Kind.CHAT, {"use_beam_search": True}, "use_beam_search"),
        (Kind.CHAT, {"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        (Kind.CHAT, {"truncate_prompt_tokens": 100}, None),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_fitness(kind: Kind, body: dict[str, Any], reason: str | None, indent: int | None) -> None:
    assert bodies.why_aggregated(kind, bodies.parse(json.dumps(body, indent=indent).encode())) == reason


def test_echo_events_that_are_held_back() -> None:
    assert bodies.held_echoes(Kind.CHAT, bodies.parse(b'{"echo":true,"n":2}')) == 2
    assert bodies.held_echoes(Kind.CHAT, bodies.parse(b'{"echo":true}')) == 1
    assert bodies.held_echoes(Kind.CHAT, bodies.parse(b'{"n":2}')) == 0
    assert bodies.held_echoes(Kind.COMPLETION, bodies.parse(b'{"echo":true,"n":2}')) == 0


def test_a_value_that_cannot_be_read_is_the_clients_fault() -> None:
    with pytest.raises(BadRequestError) as caught:
        bodies.why_aggregated(Kind.CHAT, bodies.parse(b'{"prompt_logprobs":"\xff"}'))
    assert caught.value.param == "prompt_logprobs"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(st.text().filter(lambda name: name != "kv_transfer_params"), json_values, max_size=8))
def test_any_body_reaches_decode_unharmed(body: dict[str, Any]) -> None:
    sent = json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass")
    try:
        sent.decode()
    except UnicodeDecodeError:
        sent = json.dumps(body).encode()
    out = bodies.decode_body(bodies.parse(sent), TID, PEER)
    arrived = raw(out)
    del arrived["kv_transfer_params"]
    assert arrived == raw(sent)
