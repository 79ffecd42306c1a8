"""A steady load: clients that ask again and again with prompts that nobody has asked for before."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from .bed import PROSE, Client

PROMPT_CHARACTERS = 1600
ANSWER_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and its answer. Seconds since the beginning of the load."""

    url: str
    prompt: str
    status: int
    text: str
    started_s: float
    ended_s: float

    @property
    def took_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(slots=True)
class Load:
    """`asked` is in the order of the answers. What was answered after the window is among it, but not in time."""

    window_s: float
    asked: list[Asked] = field(default_factory=list)

    @property
    def in_time(self) -> list[Asked]:
        return [one for one in self.asked if one.ended_s <= self.window_s]

    def told(self) -> str:
        cuts = quantiles((one.took_s for one in self.asked), n=20)
        worst = max(self.asked, key=lambda one: one.took_s)
        return (
            f"{len(self.in_time)} answers in {self.window_s:.0f} s, took {cuts[9]:.1f} s (median), {cuts[18]:.1f} s "
            f"(19 of 20), {worst.took_s:.1f} s (longest, asked after {worst.started_s:.1f} s)"
        )


def prompt_of(title: str) -> str:
    """Natural text that begins with its title."""
    sentences = [sentence.strip() for sentence in PROSE.split(".") if sentence.strip()]
    random.Random(title).shuffle(sentences)
    return f"{title}: " + ". ".join(sentences)[:PROMPT_CHARACTERS]


async def load(client: Client, urls: Sequence[str], title: str, window_s: float, period_s: float) -> Load:
    """One client for each of `urls`, for so long. A client asks once in a period, or as soon as it has its answer
    where that takes longer: what keeps it waiting costs answers."""
    result = Load(window_s)
    begun_s = time.monotonic()

    async def ask_on(number: int, url: str) -> None:
        due_s = period_s * number / len(urls)
        while due_s < window_s:
            await asyncio.sleep(max(0.0, begun_s + due_s - time.monotonic()))
            prompt = prompt_of(f"{title}, client {number}, letter {len(result.asked)}")
            started_s = time.monotonic() - begun_s
            reply = await client.complete(url, prompt, max_tokens=ANSWER_TOKENS, ignore_eos=True)
            ended_s = time.monotonic() - begun_s
            text = reply.text if reply.status == 200 else str(reply.body)
            result.asked.append(Asked(url, prompt, reply.status, text, started_s, ended_s))
            due_s = max(due_s + period_s, ended_s)

    await asyncio.gather(*(ask_on(number, url) for number, url in enumerate(urls)))
    return result
