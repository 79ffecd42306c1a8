"""What two engines must have in common before KV may pass between them.

`must`: the numbers in the cache mean the same (model, weights, dtypes, rope, …); any difference is refused.
`layout`: how those numbers lie in memory. Equal layouts are copied verbatim into decode's blocks (direct mode); others
land in slots and are converted (landing mode), or are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmkv import wire
from lmkv.errors import CompatError, LayoutError
from lmkv.layout import refusal
from lmkv.transfer.routes import engine_routes

from .contents import FIELDS
from .identity import PRIVATE

_CONVERTED = {"dtype", "kv_dtype"}
"""Parts of `must` in which two engines may differ if decode converts (`convert_dtype`); never copied verbatim then."""
_HINTS = {field.name: field.hint for field in FIELDS if field.hint} | {
    "weights": "both engines must serve the same weight files and have been reset as often (on_reset); compare --model "
    "and --revision on both",
    "vllm": "run the same vLLM minor version on both",
    "block_tokens": "start both with the same --block-size",
    "tp": "start both with the same --tensor-parallel-size",
    "interior": "run both on the same attention back end (CPU engines: the same instruction set and --dtype)",
    "kv_layout": "start both with the same VLLM_KV_CACHE_LAYOUT",
}
PRIVATE_HINT = (
    "weights that cannot be identified are one engine's own: serve a folder with weight files, or a hub model whose "
    "snapshot is in the Hugging Face cache, that was complete before the engines started; after a reset restart both "
    "(or see on_reset)"
)


def must_match(vllm_config: Any, vllm_version: str) -> dict[str, str]:
    """The `must` part from vLLM's configuration, but for `weights` (lmkv.vllm.identity), which takes time to know."""
    found = {field.name: field.read(vllm_config) for field in FIELDS}
    return found | {"vllm": ".".join(vllm_version.split(".")[:2])}


def is_direct(ours: wire.EngineCard, theirs: wire.EngineCard) -> bool:
    """KV is copied verbatim between these two."""
    return ours.layout == theirs.layout and is_exact(ours, theirs)


def is_exact(ours: wire.EngineCard, theirs: wire.EngineCard) -> bool:
    """KV from there is what would be computed here; else numbers have been converted."""
    return all(ours.must.get(name) == theirs.must.get(name) for name in _CONVERTED)


def compare(ours: wire.EngineCard, theirs: wire.EngineCard) -> None:
    """Raise CompatError, naming the field and what to set, unless `theirs` may exchange KV with `ours`."""
    peer = f"engine {theirs.name!r} at {theirs.address}"
    if ours.protocol != theirs.protocol:
        raise CompatError("protocol", str(ours.protocol), str(theirs.protocol), peer=peer, hint="run one lmkv version")
    if {ours.role, theirs.role} in ({"prefill"}, {"decode"}):
        raise CompatError("role", ours.role, theirs.role, peer=peer, hint="a pair is one prefill and one decode engine")
    decode = ours if ours.role == "decode" or theirs.role == "prefill" else theirs
    converted = _CONVERTED if decode.convert_dtype else set()
    names = sorted(ours.must.keys() | theirs.must.keys(), key=lambda n: (n not in ("model", "weights"), n))
    differing = [name for name in names if ours.must.get(name) != theirs.must.get(name) and name not in converted]
    if differing:
        _refuse(differing[0], ours.must, theirs.must, peer, "such KV cannot be exchanged")
    for sender, receiver in ((ours, theirs), (theirs, ours)):
        if sender.role != "decode" and receiver.role != "prefill":
            _compare_times(sender, receiver, peer)
            _compare_checksums(sender, receiver, peer)
    if is_direct(ours, theirs):
        return
    why = _not_convertible(ours, theirs) if decode is theirs else _not_convertible(theirs, ours)
    if why:
        mine, other = {**ours.must, **ours.layout}, {**theirs.must, **theirs.layout}
        field = next(name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name))
        _refuse(field, mine, other, peer, f"and it cannot be converted: {why}")


def _compare_times(prefill: wire.EngineCard, decode: wire.EngineCard, peer: str) -> None:
    """Beats must come within the other's lease. Where not every write is checked, a prefill that gives up a silent
    decode must not do so before decode has given up the transfer."""
    for name, sender, listener in (("beat_s", prefill, decode), ("beat_s", decode, prefill)):
        if 2 * sender.times.beat_s > listener.times.lease_s:
            beat, lease = f"{sender.times.beat_s:g} of {sender.name!r}", f"lease_s {listener.times.lease_s:g}"
            raise CompatError(
                name, beat, f"{lease} of {listener.name!r}", peer=peer, hint="set lease_s to at least two beat_s"
            )
    unchecked = any(worker.checked_ppm < 1_000_000 for worker in decode.workers)
    if unchecked and prefill.times.lease_s + prefill.times.hold_s < decode.times.deadline_s:
        raise CompatError(
            "deadline_s",
            f"lease_s + hold_s of {prefill.name!r} is {prefill.times.lease_s + prefill.times.hold_s:g}",
            f"deadline_s of {decode.name!r} is {decode.times.deadline_s:g}",
            peer=peer,
            hint="raise prefill's hold_s or lower decode's deadline_s: decode does not verify every write (kv_verify)",
        )


def _compare_checksums(prefill: wire.EngineCard, decode: wire.EngineCard, peer: str) -> None:
    """Prefill must be able to compute what decode demands."""
    for worker in decode.workers:
        for source in prefill.workers if worker.checked_ppm else ():
            if source.checksum != worker.checksum:
                raise CompatError(
                    "kv_verify",
                    f"{decode.name!r} verifies {worker.checksum!r}",
                    f"{prefill.name!r} computes {source.checksum or 'no checksum'!r}",
                    peer=peer,
                    hint="set kv_verify to off on the decode engine, or keep both caches in memory of one kind",
                )


def _not_convertible(prefill: wire.EngineCard, decode: wire.EngineCard) -> str:
    """Why KV of `prefill` cannot land at `decode`; empty when it can."""
    for name, card in (("prefill", prefill), ("decode", decode)):
        known = [len(worker.geometries) == len(card.block_tokens) for worker in card.workers]
        if not known or not all(known):
            return f"the layout of {name} engine {card.name!r} is not one that lmkv knows"
    if any(worker.slots == 0 for worker in decode.workers):
        return f"decode engine {decode.name!r} has no memory for it (landing_bytes)"
    sources = [worker.geometries for worker in prefill.workers]
    targets = [worker.geometries for worker in decode.workers]
    if len(sources[0]) != len(targets[0]):
        return f"{len(sources[0])} KV groups at prefill, {len(targets[0])} at decode"
    for source, target in zip(sources[0], targets[0], strict=True):
        if why := refusal(source, target, convert_dtype=decode.convert_dtype):
            return why
    try:
        engine_routes(sources, targets)
    except LayoutError as error:
        return error.message
    slot_bytes = min(worker.slot_bytes for worker in decode.workers)
    largest = max(layer.block_bytes for worker in prefill.workers for layer in worker.layers)
    if largest > slot_bytes:
        return f"a block of prefill has {largest} bytes, decode's landing_slot_bytes are {slot_bytes}"
    return ""


def _refuse(name: str, ours: Mapping[str, str], theirs: Mapping[str, str], peer: str, fallback: str) -> None:
    hint = _HINTS.get(name, fallback)
    if name == "weights" and any(side.get(name, "").startswith(PRIVATE) for side in (ours, theirs)):
        hint = PRIVATE_HINT
    if fallback.startswith("and"):
        hint = f"{fallback}; {hint}"
    raise CompatError(name, ours.get(name, "-"), theirs.get(name, "-"), peer=peer, hint=hint)
