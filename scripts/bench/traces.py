"""Request traces as chains of page keys: published ones from files, or one that is made up here."""

from __future__ import annotations

import json
import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from bench.errors import BenchError

CHUNK_TOKENS = 128
BLOCK_TOKENS = 512
"""Of the files: one number of `hash_ids` stands for so many tokens and all before them."""


@dataclass(frozen=True, slots=True)
class Trace:
    """`chains`: a request's full chunks, from the first token on. Equal keys are equal beginnings up to there."""

    name: str
    chains: list[tuple[bytes, ...]]
    tokens: int
    """Of all prompts, with what fills no chunk."""


def read(folder: Path, limit: int | None) -> list[Trace]:
    """Every *.jsonl of `folder`: a line a request, with `input_length` and `hash_ids`. Raises BenchError."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise BenchError(f"no *.jsonl in {folder} · give a folder of request traces, or none to use a made-up one")
    return [_read_file(file, limit) for file in files]


def _read_file(file: Path, limit: int | None) -> Trace:
    keys: dict[tuple[int, int], bytes] = {}
    chains, tokens = [], 0
    for number, line in enumerate(file.read_text().splitlines()):
        if limit is not None and number >= limit:
            break
        try:
            request = json.loads(line)
            length, blocks = int(request["input_length"]), [int(block) for block in request["hash_ids"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(
                f"{file}, line {number + 1}: {error!r} · a line needs input_length and hash_ids"
            ) from error
        chains.append(tuple(_chain(keys, blocks, length)))
        tokens += length
    return Trace(file.stem.removesuffix("_trace"), chains, tokens)


def _chain(keys: dict[tuple[int, int], bytes], blocks: Sequence[int], tokens: int) -> Iterator[bytes]:
    """One bytes object a key, whoever has it."""
    per_block = BLOCK_TOKENS // CHUNK_TOKENS
    for i in range(min(tokens // CHUNK_TOKENS, len(blocks) * per_block)):
        place = (blocks[i // per_block], i % per_block)
        yield keys.setdefault(place, b"%d.%d" % place)


def made_up(requests: int, seed: int = 1) -> Trace:
    """Conversations that share system prompts (Zipf) and come back turn by turn, and documents asked about once."""
    chance = random.Random(seed)
    weights = list(accumulate(1 / rank for rank in range(1, 41)))
    prompts = [chance.randint(2, 24) for _ in weights]
    talks: list[list[bytes]] = []
    chains: list[tuple[bytes, ...]] = []
    for number in range(requests):
        kind = chance.random()
        if kind < 0.1:
            talk = [b"d%d.%d" % (number, i) for i in range(chance.randint(40, 240))]
        elif kind < 0.35 or not talks:
            prompt = bisect(weights, chance.random() * weights[-1])
            talk = [b"s%d.%d" % (prompt, i) for i in range(prompts[prompt])]
            talks.append(talk)
        else:
            # Who has just spoken is likely to speak again.
            talk = talks[-1 - min(int(chance.expovariate(1 / 60)), len(talks) - 1)]
        talk += [b"t%d.%d" % (number, i) for i in range(chance.randint(1, 12))]
        chains.append(tuple(talk))
    return Trace("made-up", chains, CHUNK_TOKENS * sum(map(len, chains)))
