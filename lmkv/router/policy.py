"""Which prefill and which decode engine: pure functions over a snapshot.

A policy sees candidates that may all be chosen and names one. `choose` decides who is a candidate: refused pairs
never, engines that failed this request and pairs not yet warm only when there is nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

PolicyName = Literal["round-robin", "least-loaded"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A healthy engine and what this router has in flight there."""

    name: str
    requests: int = 0
    prompt_bytes: int = 0
    """Of prompts still being computed: the size of the work on a prefill engine."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`turn` counts choices made. Pairs are (prefill, decode)."""

    prefill: tuple[Candidate, ...]
    decode: tuple[Candidate, ...]
    turn: int = 0
    ready: frozenset[tuple[str, str]] = field(default=frozenset())
    refused: frozenset[tuple[str, str]] = field(default=frozenset())
    avoid: frozenset[str] = field(default=frozenset())
    """Engines at which an attempt of the same request has failed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`prefill` None: decode computes alone, and `aggregated` says why. `decode` None: nobody can serve."""

    prefill: str | None
    decode: str | None
    prefill_why: str = ""
    decode_why: str = ""
    aggregated: str = ""


Policy = Callable[[Sequence[Candidate], int], tuple[Candidate, str]]


def round_robin(candidates: Sequence[Candidate], turn: int) -> tuple[Candidate, str]:
    return candidates[turn % len(candidates)], f"round-robin: turn {turn} of {len(candidates)}"


def least_requests(candidates: Sequence[Candidate], turn: int) -> tuple[Candidate, str]:
    """For decode: a request occupies it for its whole life, whatever its prompt."""
    chosen = min(_rotated(candidates, turn), key=lambda c: c.requests)
    return chosen, f"least-loaded: {chosen.requests} requests in flight, least of {len(candidates)}"


def least_prompt_bytes(candidates: Sequence[Candidate], turn: int) -> tuple[Candidate, str]:
    """For prefill: a request occupies it for as long as its prompt takes."""
    chosen = min(_rotated(candidates, turn), key=lambda c: (c.prompt_bytes, c.requests))
    return chosen, f"least-loaded: {chosen.prompt_bytes} prompt bytes in flight, least of {len(candidates)}"


PREFILL_POLICIES: dict[PolicyName, Policy] = {"round-robin": round_robin, "least-loaded": least_prompt_bytes}
DECODE_POLICIES: dict[PolicyName, Policy] = {"round-robin": round_robin, "least-loaded": least_requests}


def choose(snapshot: Snapshot, prefill_policy: Policy, decode_policy: Policy, aggregated: str = "") -> Choice:
    """`aggregated`: the reason why decode has to work alone, if there is one already."""
    if not snapshot.decode:
        return Choice(None, None)
    if not aggregated:
        if not snapshot.prefill:
            aggregated = "no_prefill"
        else:
            choice = _choose_pair(snapshot, prefill_policy, decode_policy)
            if choice is not None:
                return choice
            aggregated = "pairs_refused"
    decode, why = decode_policy(_prefer(snapshot.decode, lambda d: d.name not in snapshot.avoid), snapshot.turn)
    return Choice(None, decode.name, decode_why=why, aggregated=aggregated)


def _choose_pair(snapshot: Snapshot, prefill_policy: Policy, decode_policy: Policy) -> Choice | None:
    """None if every pair is refused."""
    refused, ready, avoid = snapshot.refused, snapshot.ready, snapshot.avoid
    fresh = [d for d in snapshot.decode if d.name not in avoid]

    def allowed(p: Candidate, decodes: Iterable[Candidate]) -> bool:
        return not refused or any((p.name, d.name) not in refused for d in decodes)

    prefills = [p for p in snapshot.prefill if allowed(p, snapshot.decode)]
    if not prefills:
        return None
    prefills = _prefer(
        prefills,
        lambda p: p.name not in avoid,
        lambda p: allowed(p, fresh),
        lambda p: any((p.name, d.name) in ready for d in fresh or snapshot.decode),
    )
    prefill, prefill_why = prefill_policy(prefills, snapshot.turn)
    decodes = _prefer(
        [d for d in snapshot.decode if (prefill.name, d.name) not in refused],
        lambda d: d.name not in avoid,
        lambda d: (prefill.name, d.name) in ready,
    )
    decode, decode_why = decode_policy(decodes, snapshot.turn)
    return Choice(prefill.name, decode.name, prefill_why, decode_why)


def _prefer(candidates: Sequence[Candidate], *wishes: Callable[[Candidate], bool]) -> list[Candidate]:
    """Narrowed by each wish in turn that leaves somebody."""
    left = list(candidates)
    for wish in wishes:
        left = [c for c in left if wish(c)] or left
    return left


def _rotated(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    """Equals are taken in turn, else an idle system would send everything to the first engine."""
    at = turn % len(candidates)
    return [*candidates[at:], *candidates[:at]]
