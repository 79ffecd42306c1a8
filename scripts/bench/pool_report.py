"""From samples of the pool benchmark to cells, named figures and a table. Times are milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.stats import median, spread

CHUNK = 128


@dataclass(frozen=True, slots=True)
class Sample:
    """One method and length in one round. `plain_ms`: plain vLLM computing a prompt of that length in that round.
    `compute_ms`: this engine computing the prompt (and storing it). `floor_ms`: for a prompt that it still holds."""

    method: str
    tokens: int
    round: int
    plain_ms: float
    compute_ms: float
    ttft_ms: float
    floor_ms: float
    cached_tokens: int
    same_answer: bool
    """As from the engine's own prefix cache (computing a whole prompt rounds differently in bfloat16)."""

    @property
    def hit(self) -> bool:
        return self.cached_tokens >= self.tokens - CHUNK - 1


def cells(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys((s.method, s.tokens) for s in samples))
    return [_cell([s for s in samples if (s.method, s.tokens) == key]) for key in keys]


def _cell(group: Sequence[Sample]) -> dict[str, Any]:
    first = group[0]
    return {
        "method": first.method,
        "tokens": first.tokens,
        "n": len(group),
        "hits": sum(s.hit for s in group),
        "cached_tokens": [s.cached_tokens for s in group],
        "same_answers": sum(s.same_answer for s in group),
        "plain_ms": spread([s.plain_ms for s in group]),
        "compute_ms": spread([s.compute_ms for s in group]),
        "ttft_ms": spread([s.ttft_ms for s in group]),
        "floor_ms": spread([s.floor_ms for s in group]),
        "speedup": spread([s.plain_ms / s.ttft_ms for s in group]),
        "compute_over_plain": spread([s.compute_ms / s.plain_ms for s in group], digits=4),
    }


def _at(found: Sequence[dict[str, Any]], method: str, tokens: int) -> dict[str, Any] | None:
    return next((cell for cell in found if (cell["method"], cell["tokens"]) == (method, tokens)), None)


def summary(found: Sequence[dict[str, Any]], notes: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for cell in found:
        if cell["method"] != "plain":
            flat[f"ttft_speedup_{cell['method']}_{_name(cell['tokens'])}"] = cell["speedup"]["median"]
    longest = max((cell["tokens"] for cell in found), default=0)
    remote, local, other = (_at(found, method, longest) for method in ("remote", "local", "lmcache"))
    if remote is not None and "link_bytes_per_s" in notes:
        moved = longest // CHUNK * CHUNK * notes["kv_bytes_per_token"]
        limit_ms = remote["floor_ms"]["median"] + moved / notes["link_bytes_per_s"] * 1e3
        flat[f"limit_ms_{_name(longest)}"] = round(limit_ms, 2)
        flat[f"ttft_vs_limit_{_name(longest)}"] = round(remote["ttft_ms"]["median"] / limit_ms, 4)
    if local is not None and other is not None:
        flat[f"overhead_vs_lmcache_{_name(longest)}"] = round(_overhead_ms(local) / _overhead_ms(other), 4)
    stores = [cell["compute_over_plain"]["median"] for cell in found if cell["method"] == "local"]
    if stores:
        flat["engine_slowdown"] = round(median(stores) - 1, 4)
    return flat | {name: value for name, value in notes.get("moves", {}).items()}


def _overhead_ms(cell: dict[str, Any]) -> float:
    """What loading adds to the time for a prompt that the same engine still holds."""
    return float(cell["ttft_ms"]["median"] - cell["floor_ms"]["median"])


def _name(tokens: int) -> str:
    return "3500" if tokens == 3585 else str(tokens)


GOALS = {
    "ttft_speedup_remote_3500": (">=", 20.0),
    "ttft_speedup_local_3500": (">=", 25.0),
    "ttft_vs_limit_3500": ("<=", 1.5),
    "store_vs_nixl": (">=", 0.7),
    "load_vs_nixl": (">=", 0.7),
    "engine_slowdown": ("<=", 0.03),
}


def table(found: Sequence[dict[str, Any]], flat: dict[str, Any]) -> str:
    rows = [["tokens", "method", "plain", "compute", "from pool", "floor", "speed-up", "hits", "same"]]
    for cell in sorted(found, key=lambda cell: int(cell["tokens"])):
        row = [str(cell["tokens"]), cell["method"]]
        row += [f"{cell[name]['median']:.0f} ±{cell[name]['iqr']:.0f}" for name in ("plain_ms", "compute_ms")]
        row += [f"{cell[name]['median']:.1f} ±{cell[name]['iqr']:.1f}" for name in ("ttft_ms", "floor_ms")]
        row += [
            f"{cell['speedup']['median']:.1f}",
            f"{cell['hits']}/{cell['n']}",
            f"{cell['same_answers']}/{cell['n']}",
        ]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [
        "",
        "TTFT in ms, median ±IQR. speed-up: plain / from pool, same round. same: answers as from the own cache.",
        "",
    ]
    for name, value in flat.items():
        lines.append(f"{name} = {value}{_verdict(name, value)}")
    return "\n".join(lines)


def _verdict(name: str, value: float) -> str:
    if name not in GOALS:
        return ""
    sign, goal = GOALS[name]
    met = value >= goal if sign == ">=" else value <= goal
    return f"   (goal {sign} {goal}: {'met' if met else 'missed'})"
