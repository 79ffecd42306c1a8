"""Reads the router's /explain of one request and tells it in the order in which it happened. Pure.

Tolerant: whatever an engine doesn't report (an older one, another transport) is left out, never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOMENTS: tuple[tuple[str, str, str], ...] = (
    # side, key, what is told; rank keys and engine keys alike
    ("prefill", "arrived_s", "prefill engine has the request"),
    ("decode", "arrived_s", "decode engine has the request"),
    ("decode", "granted_s", "decode has granted its blocks"),
    ("prefill", "scheduled_s", "prefill starts to compute"),
    ("prefill", "first_computed_s", "first layer computed"),
    ("prefill", "first_post_s", "first WRITE posted"),
    ("decode", "first_landed_s", "first WRITE landed"),
    ("prefill", "last_computed_s", "last layer computed"),
    ("prefill", "last_post_s", "last WRITE posted"),
    ("prefill", "sealed_s", "sealed by prefill"),
    ("decode", "last_landed_s", "last WRITE landed"),
    ("decode", "sealed_s", "seal arrived"),
    ("decode", "loaded_s", "decode may start"),
)


@dataclass(slots=True)
class Story:
    """One request. Milliseconds count from its arrival at the router."""

    mode: str = "unknown"
    why_not: str = ""
    """Why the KV was not handed over, if it was not."""
    engines: str = ""
    tokens: int = 0
    pushed_bytes: int = 0
    writes: int = 0
    attempts: int = 0
    moments: list[tuple[float, str, str]] = field(default_factory=list)
    """(ms, name, what), in the order of time."""

    @property
    def handed_over(self) -> bool:
        return self.mode == "pd" and self.pushed_bytes > 0 and not self.why_not

    def at(self, name: str) -> float | None:
        return next((ms for ms, known, _ in self.moments if known == name), None)

    @property
    def lead_ms(self) -> float | None:
        """How long before the end of computing the first WRITE was posted; None if it is not known."""
        posted, computed = self.at("prefill.first_post"), self.at("prefill.last_computed")
        return None if posted is None or computed is None else computed - posted

    @property
    def tail_ms(self) -> float | None:
        """From the last layer computed to the last byte landed."""
        landed, computed = self.at("decode.last_landed"), self.at("prefill.last_computed")
        return None if landed is None or computed is None else landed - computed

    def summary(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "handed_over": self.handed_over,
            "why_not": self.why_not,
            "pushed_tokens": self.tokens,
            "pushed_bytes": self.pushed_bytes,
            "writes": self.writes,
            "attempts": self.attempts,
            "overlap": None if self.lead_ms is None else self.lead_ms > 0,
            "moments_ms": {name: round(ms, 3) for ms, name, _ in self.moments},
        }


def read(explain: Mapping[str, Any], clock_offset_s: float) -> Story:
    """`clock_offset_s`: wall clock minus monotonic clock on this host; the engines' moments are monotonic."""
    story = Story(mode=str(explain.get("mode", "unknown")), why_not=str(explain.get("aggregated_why") or ""))
    attempts = [a for a in explain.get("attempts") or [] if isinstance(a, Mapping)]
    story.attempts = len(attempts)
    if not attempts:
        return story
    last = attempts[-1]
    story.engines = f"{last.get('prefill') or '–'} → {last.get('decode') or '–'}"
    told = last.get("engines") or {}
    sides = {side: told.get(side) or {} for side in ("prefill", "decode")}
    _count(story, sides)
    arrived_s = float(explain.get("arrived_unix_ms") or 0) / 1000 - clock_offset_s
    for side, key, what in MOMENTS:
        moment_s = _moment(sides[side], key)
        if moment_s:
            story.moments.append(((moment_s - arrived_s) * 1000, f"{side}.{key.removesuffix('_s')}", what))
    if (first_token_ms := last.get("first_token_ms")) is not None:
        story.moments.append((float(first_token_ms), "router.first_token", "first token at the router"))
    story.moments.sort(key=lambda moment: moment[0])
    return story


def is_complete(explain: Mapping[str, Any]) -> bool:
    """Both engines have told their part; their workers do so a moment after the answer."""
    attempts = explain.get("attempts") or [{}]
    told = attempts[-1].get("engines") or {}
    return all((told.get(side) or {}).get("ranks") for side in ("prefill", "decode"))


def _count(story: Story, sides: Mapping[str, Mapping[str, Any]]) -> None:
    sent, got = sides["prefill"], sides["decode"]
    story.pushed_bytes = sum(int(rank.get("bytes", 0)) for rank in _ranks(sent))
    story.writes = sum(int(rank.get("writes", 0)) for rank in _ranks(sent))
    tokens = int(got.get("prompt_tokens", 0)) - int(got.get("first_token", 0))
    story.tokens = max(0, tokens) if story.pushed_bytes else 0
    troubles = [side.get("trouble") or side.get("miss") or side.get("not_needed") for side in (sent, got)]
    story.why_not = story.why_not or next((str(trouble) for trouble in troubles if trouble), "")


def _ranks(side: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    ranks = side.get("ranks") or {}
    return [rank for rank in ranks.values() if isinstance(rank, Mapping)]


def _moment(side: Mapping[str, Any], key: str) -> float:
    """Of all ranks: the earliest of a first_…, the latest of anything else. 0.0: nobody knows it."""
    if isinstance(own := side.get(key), int | float):
        return float(own)
    known = [float(rank[key]) for rank in _ranks(side) if isinstance(rank.get(key), int | float) and rank[key] > 0]
    pick: Callable[[Iterable[float]], float] = min if key.startswith("first_") else max
    return pick(known) if known else 0.0


def render(story: Story) -> list[str]:
    """Lines for a terminal."""
    lines = [f"  engines   {story.engines or '–'}  (mode {story.mode}, attempt {story.attempts or '–'})"]
    if story.pushed_bytes:
        mean_kb = story.pushed_bytes / max(1, story.writes) / 1e3
        lines.append(
            f"  pushed    {story.tokens} tokens · {story.pushed_bytes / 1e6:.1f} MB · "
            f"{story.writes} writes of {mean_kb:.0f} kB on average"
        )
    if story.why_not:
        lines.append(f"  trouble   {story.why_not}")
    if story.moments:
        lines.append("  moments   ms after the request arrived")
        lines += [f"  {ms:12.1f}  {what}" for ms, _, what in story.moments]
    if story.lead_ms is not None:
        verdict = "yes" if story.lead_ms > 0 else "no"
        side = "before" if story.lead_ms > 0 else "after"
        lines.append(
            f"  overlap   {verdict}: the first WRITE was posted {abs(story.lead_ms):.1f} ms {side} "
            "the last layer was computed"
        )
    if story.tail_ms is not None:
        lines.append(f"  tail      the last WRITE landed {story.tail_ms:.1f} ms after the last layer was computed")
    return lines
