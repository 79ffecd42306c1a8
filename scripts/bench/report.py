"""From samples to cells, a flat summary and a table. Times are milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.stats import median, spread

BLOCK_TOKENS = 128
PEERS = ("pull", "push")


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition of one method at one length, with the plain engine's time for the same prompt in the same round.

    busy_ms: plain vLLM for a prompt of this length while the other core is busy, as it is in a handover. own_ms: the
    pair's prefill engine alone, asked like the plain engine. floor_ms: decode, for a prompt that it holds.
    """

    method: str
    tokens: int
    repetition: int
    plain_ms: float
    busy_ms: float
    ttft_ms: float
    own_ms: float
    floor_ms: float
    handed_tokens: int
    same_answer: bool
    link_bytes: int | None = None

    @property
    def handed_over(self) -> bool:
        """Whether decode got the prompt's KV, all but one block at most, instead of computing it."""
        return self.handed_tokens >= self.tokens - BLOCK_TOKENS - 1


@dataclass(frozen=True, slots=True)
class LinkFacts:
    rate_mbit: float
    kv_bytes_per_token: int

    def transfer_ms(self, tokens: int) -> float:
        return tokens * self.kv_bytes_per_token * 8 / (self.rate_mbit * 1e6) * 1e3


def cells(samples: Sequence[Sample], link: LinkFacts | None) -> list[dict[str, Any]]:
    """One for each method and length. `overhead_ms` and `pd_over_plain` are taken within each repetition."""
    keys = list(dict.fromkeys((sample.method, sample.tokens) for sample in samples))
    return [_cell([s for s in samples if (s.method, s.tokens) == key], link) for key in keys]


def _cell(group: Sequence[Sample], link: LinkFacts | None) -> dict[str, Any]:
    first = group[0]
    cell: dict[str, Any] = {
        "method": first.method,
        "tokens": first.tokens,
        "n": len(group),
        "plain_ttft_ms": spread([s.plain_ms for s in group]),
        "ttft_ms": spread([s.ttft_ms for s in group]),
        "overhead_ms": spread([s.ttft_ms - s.plain_ms for s in group]),
        "pd_over_plain": spread([s.ttft_ms / s.plain_ms for s in group], digits=4),
        "plain_busy_ttft_ms": spread([s.busy_ms for s in group]),
        "pd_over_plain_busy": spread([s.ttft_ms / s.busy_ms for s in group], digits=4),
        "own_prefill_ttft_ms": spread([s.own_ms for s in group]),
        "overhead_vs_own_ms": spread([s.ttft_ms - s.own_ms for s in group]),
        "floor_ms": spread([s.floor_ms for s in group]),
        "handed_over": sum(s.handed_over for s in group),
        "handed_tokens": [s.handed_tokens for s in group],
        "same_answers": sum(s.same_answer for s in group),
    }
    if link is not None:
        sent = [s.link_bytes for s in group if s.link_bytes is not None]
        transfer_ms = link.transfer_ms(first.tokens)
        limit_ms = max(cell["plain_ttft_ms"]["median"], transfer_ms) + cell["floor_ms"]["median"]
        cell |= {
            "link_transfer_ms": round(transfer_ms, 2),
            "limit_ms": round(limit_ms, 2),
            "ttft_vs_limit": round(cell["ttft_ms"]["median"] / limit_ms, 4),
            "kv_bytes": first.tokens * link.kv_bytes_per_token,
            "link_bytes": int(median(sent)) if sent else None,
        }
    return cell


def _ratio(above: float, below: float) -> float | None:
    """None where the divisor is not positive: such a ratio would say nothing."""
    return round(above / below, 4) if below > 0 else None


def _at(found: Sequence[dict[str, Any]], method: str, tokens: int) -> dict[str, Any] | None:
    return next((cell for cell in found if (cell["method"], cell["tokens"]) == (method, tokens)), None)


def _overhead(cell: dict[str, Any]) -> float:
    return float(cell["overhead_ms"]["median"])


def summary(found: Sequence[dict[str, Any]], link: LinkFacts | None) -> dict[str, Any]:
    """Named figures; a key is missing only where its method or length was not measured."""
    flat: dict[str, Any] = {}
    for tokens in dict.fromkeys(cell["tokens"] for cell in found):
        flat |= _at_length(found, tokens) if link is None else _at_length_linked(found, tokens)
    if link is not None:
        flat["link_mbit"] = round(link.rate_mbit, 1)
        for name in ("link_overhead_vs_pull", "link_ttft_vs_limit"):
            values = [flat[f"{name}_{tokens}"] for tokens in (1025, 2049) if flat.get(f"{name}_{tokens}") is not None]
            if values:
                flat[name] = max(values)
    return flat


def _at_length(found: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for method in ("lmkv", *PEERS):
        cell = _at(found, method, tokens)
        if cell is not None:
            own = "" if method == "lmkv" else f"{method}_"
            flat[f"{own}pd_over_plain_{tokens}"] = cell["pd_over_plain"]["median"]
            flat[f"{own}pd_over_plain_busy_{tokens}"] = cell["pd_over_plain_busy"]["median"]
            flat[f"{method}_overhead_ms_{tokens}"] = _overhead(cell)
            flat[f"{method}_overhead_vs_own_ms_{tokens}"] = cell["overhead_vs_own_ms"]["median"]
    ours = _at(found, "lmkv", tokens)
    peers = [cell for cell in (_at(found, peer, tokens) for peer in PEERS) if cell is not None]
    if ours is not None and peers:
        best = min(peers, key=_overhead)
        flat[f"best_peer_{tokens}"] = best["method"]
        flat[f"overhead_vs_best_peer_{tokens}"] = _ratio(_overhead(ours), _overhead(best))
        kind = min(peer["overhead_vs_own_ms"]["median"] for peer in peers)
        flat[f"overhead_vs_best_peer_own_{tokens}"] = _ratio(ours["overhead_vs_own_ms"]["median"], kind)
    return flat


def _at_length_linked(found: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for method in ("lmkv", *PEERS):
        cell = _at(found, method, tokens)
        if cell is not None:
            own = "" if method == "lmkv" else f"{method}_"
            flat[f"link_{own}ttft_vs_limit_{tokens}"] = cell["ttft_vs_limit"]
            flat[f"link_{method}_overhead_ms_{tokens}"] = _overhead(cell)
    ours, pull = _at(found, "lmkv", tokens), _at(found, "pull", tokens)
    if ours is not None and pull is not None:
        flat[f"link_overhead_vs_pull_{tokens}"] = _ratio(_overhead(ours), _overhead(pull))
    return flat


GOALS = {
    "pd_over_plain_1025": 1.05,
    "pd_over_plain_2049": 1.05,
    "overhead_vs_best_peer_1025": 0.5,
    "overhead_vs_best_peer_2049": 0.5,
    "link_overhead_vs_pull": 0.2,
    "link_ttft_vs_limit": 1.15,
}


LEGEND = (
    "TTFT in ms, median ±IQR. overhead: P/D − plain, same prompt, same round. busy: plain vLLM while the other core",
    "polls, as decode's does in a handover. own prefill: the pair's prefill engine alone. floor: decode for a prompt",
    "that it holds. same: answers equal to plain vLLM's.",
)


def table(found: Sequence[dict[str, Any]], flat: dict[str, Any]) -> str:
    linked = any("limit_ms" in cell for cell in found)
    heads = ["tokens", "method", "plain", "P/D", "overhead", "P/D:plain", "busy", "P/D:busy"]
    heads += ["own prefill", "floor", "KV moved", "same"]
    rows = [heads + (["limit", "P/D:limit"] if linked else [])]
    rows += [_row(cell) for cell in sorted(found, key=lambda cell: int(cell["tokens"]))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += ["", *LEGEND, ""]
    for name, value in flat.items():
        goal = f"   (goal ≤ {GOALS[name]}: {_verdict(value, GOALS[name])})" if name in GOALS else ""
        lines.append(f"{name} = {value}{goal}")
    return "\n".join(lines)


def _verdict(value: float | None, goal: float) -> str:
    if value is None:
        return "not known"
    return "met" if value <= goal else "missed"


def _row(cell: dict[str, Any]) -> list[str]:
    def both(name: str) -> str:
        return f"{cell[name]['median']:.0f} ±{cell[name]['iqr']:.0f}"

    row = [str(cell["tokens"]), cell["method"], both("plain_ttft_ms"), both("ttft_ms"), both("overhead_ms")]
    row += [f"{cell['pd_over_plain']['median']:.3f}", both("plain_busy_ttft_ms")]
    row += [f"{cell['pd_over_plain_busy']['median']:.3f}", both("own_prefill_ttft_ms"), both("floor_ms")]
    row += [f"{cell['handed_over']}/{cell['n']}", f"{cell['same_answers']}/{cell['n']}"]
    if "limit_ms" in cell:
        row += [f"{cell['limit_ms']:.0f}", f"{cell['ttft_vs_limit']:.3f}"]
    return row
