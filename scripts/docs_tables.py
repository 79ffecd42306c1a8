#!/usr/bin/env python3
"""Writes the tables of the docs that come from the code. `--check` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings

from lmkv import errors, layout, wire
from lmkv.config import ConnectorSettings
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.obs import metrics
from lmkv.pool.settings import ENV_PREFIX, NodeSettings
from lmkv.router.metrics import RouterMetrics
from lmkv.vllm.contents import FIELDS
from lmkv.vllm.fingerprint import compare, is_direct

DOCS = Path(__file__).resolve().parent.parent / "docs"


def settings_table() -> str:
    return _settings(ConnectorSettings, "LMKV_")


def pool_table() -> str:
    return _settings(NodeSettings, ENV_PREFIX)


def _settings(settings: type[BaseSettings], prefix: str) -> str:
    lines = ["| setting | variable | default | meaning |", "|---|---|---|---|"]
    for name, field in settings.model_fields.items():
        default = field.default if field.default not in ("", ()) else "–"
        lines.append(f"| `{name}` | `{prefix}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


def errors_table() -> str:
    lines = ["| code | error | meaning |", "|---|---|---|"]
    meanings = _meanings()
    for error in sorted(_family(errors.LmkvError), key=lambda c: (c.code, c.__name__)):
        said = meanings.get(error.__name__) or (error.__doc__ or "any error of lmkv").strip().splitlines()[0]
        lines.append(f"| `{error.code}` | `{error.__name__}` | {said} |")
    return "\n".join(lines)


def _family(error: type[errors.LmkvError]) -> set[type[errors.LmkvError]]:
    """The class and all its public subclasses, of the modules that define errors of their own too."""
    import lmkv.client
    import lmkv.control.admin
    import lmkv.control.client
    import lmkv.control.etcd
    import lmkv.pool.tiers.disk
    import lmkv.router.replies  # noqa: F401

    children = [child for child in error.__subclasses__() if not child.__name__.startswith("_")]
    return {error}.union(*(_family(child) for child in children))


def _meanings() -> dict[str, str]:
    """From the tree drawn in the docstring of errors.py."""
    found = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", " ").replace("└──", " ").split()
        if len(words) > 2 and hasattr(errors, words[0]):
            found[words[0]] = " ".join(words[2:])
    return found


def _engine(
    role: str,
    *,
    order: str = "LBHNC",
    tp: int = 1,
    heads: int = 8,
    tokens: int = 16,
    parts: tuple[int, ...] = (128, 128),
    interior: str = "plain",
    dtype: str = "bfloat16",
    slots: int = 32,
    convert_dtype: bool = False,
) -> wire.EngineCard:
    """The card of an engine with 4 layers."""
    workers, each = [], max(1, heads // tp)
    for rank in range(tp):
        geometry = layout.vllm_cache(
            order,
            layers=4,
            blocks=64,
            heads=each,
            block_tokens=tokens,
            parts=parts,
            interior=interior,
            dtype=dtype,
            first_head=rank * each if heads >= tp else rank * heads // tp,
            total_heads=heads,
        )
        block_bytes = tokens * each * sum(parts) * geometry.width
        layer = wire.LayerCard(4096, block_bytes, block_bytes, 64, 0)
        workers.append(
            wire.WorkerCard(Rank(rank), "", "nixl", b"", "DRAM", (layer,) * 4, 0, 0, (geometry,), 1, slots, 2 << 20)
        )
    must = {"model": "m", "dtype": dtype, "kv_heads": str(heads), "head_size": str(parts[0])}
    lies = {"block_tokens": str(tokens), "kv_layout": order, "tp": str(tp), "interior": interior}
    name, incarnation = EngineName(role), Incarnation(role)
    return wire.EngineCard(
        name, incarnation, "tcp://x:1", role, must, lies, (tokens,), tuple(workers), convert_dtype=convert_dtype
    )


MLA: dict[str, Any] = {"heads": 1, "parts": (576,), "tokens": 64}
CPU: dict[str, Any] = {"heads": 4, "parts": (64, 64), "tokens": 128}
PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("nothing", {}, {}),
    ("physical order LBNHC → LBHNC", {"order": "LBNHC"}, {}),
    ("physical order LBHNC → BLNHC", {}, {"order": "BLNHC"}),
    ("block size 16 → 64", {}, {"tokens": 64}),
    ("block size 128 → 32", {"tokens": 128}, {"tokens": 32}),
    ("block size 48 → 32 (neither divides the other)", {"tokens": 48}, {"tokens": 32}),
    ("TP 1 → 4", {}, {"tp": 4}),
    ("TP 8 → 2", {"tp": 8}, {"tp": 2}),
    ("TP 16 → 4 with 8 KV heads (heads held twice)", {"tp": 16}, {"tp": 4}),
    ("order, block size and TP at once", {"order": "LBNHC", "tp": 2}, {"tokens": 64, "tp": 8}),
    ("CPU packing vec → amx", {**CPU, "interior": "vec"}, {**CPU, "interior": "amx"}),
    ("GPU (plain) → CPU (amx)", {**CPU, "tokens": 16}, {**CPU, "interior": "amx"}),
    ("CPU (vec16, block 16) → GPU (plain)", {**CPU, "tokens": 16, "interior": "vec16"}, CPU),
    ("MLA, block size 64 → 16", MLA, {**MLA, "tokens": 16}),
    ("MLA, TP 1 → 8", MLA, {**MLA, "tp": 8}),
    ("dtype float32 → bfloat16", {"dtype": "float32"}, {}),
    ("dtype float32 → bfloat16, allowed by decode", {"dtype": "float32"}, {"convert_dtype": True}),
    ("dtype bfloat16 → float8_e4m3fn, allowed by decode", {}, {"dtype": "float8_e4m3fn", "convert_dtype": True}),
    ("number of KV heads", {}, {"heads": 4}),
    ("head size", {}, {"parts": (64, 64)}),
    ("block size, decode without landing_bytes", {}, {"tokens": 64, "slots": 0}),
    ("block size, a block of prefill larger than a slot", {"tokens": 1024}, {}),
]


def conversions_table() -> str:
    lines = ["| what differs, prefill → decode | mode | refused because |", "|---|---|---|"]
    for what, prefill, decode in PAIRS:
        source, target = _engine("prefill", **prefill), _engine("decode", **decode)
        try:
            compare(target, source)
        except errors.CompatError as error:
            why = error.hint.removeprefix("and it cannot be converted: ").split(";")[0]
            lines.append(f"| {what} | refused | `{error.field}`: {why} |")
        else:
            lines.append(f"| {what} | {'direct' if is_direct(target, source) else 'landing'} | |")
    return "\n".join(lines)


def contents_table() -> str:
    lines = ["| field | what is in it |", "|---|---|"]
    lines += [f"| `{field.name}` | {field.settings} |" for field in FIELDS]
    lines.append("| `vllm` | vLLM's minor version |")
    lines.append("| `weights` | the weight files' digest, a drafter's included; or the engine, if they are private |")
    return "\n".join(lines)


def metrics_table() -> str:
    """The router's metrics by the names that /metrics has: a counter ends with _total."""
    lines = ["| metric | labels | meaning |", "|---|---|---|"]
    counters = {family.name for family in RouterMetrics().registry.collect() if family.type == "counter"}
    for spec in metrics.TABLE:
        name = f"{spec.name}_total" if spec.name in counters else spec.name
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "–"
        lines.append(f"| `{name}` | {labels} | {spec.help} |")
    return "\n".join(lines)


TABLES = {
    "fingerprint.md": ("contents", contents_table),
    "router.md": ("metrics", metrics_table),
    "connector.md": ("settings", settings_table),
    "pool.md": ("pool", pool_table),
    "errors.md": ("errors", errors_table),
    "conversions.md": ("conversions", conversions_table),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say which file is stale, change nothing")
    check = parser.parse_args().check
    stale = []
    for name, (mark, table) in TABLES.items():
        path = DOCS / name
        text = path.read_text()
        head, rest = text.split(f"<!-- {mark} -->\n", 1)
        tail = rest.split(f"<!-- /{mark} -->", 1)[1]
        fresh = f"{head}<!-- {mark} -->\n{table()}\n<!-- /{mark} -->{tail}"
        if fresh != text:
            stale.append(name)
            if not check:
                path.write_text(fresh)
    if check and stale:
        print(f"stale: {', '.join(stale)} · run scripts/docs_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
