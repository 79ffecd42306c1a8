"""Prompts of natural text with an exact number of tokens, each unlike every other from its first block on."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

PROSE = Path(__file__).with_name("prose.txt")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model's config.json says about its KV cache."""

    layers: int
    kv_heads: int
    head_size: int
    dtype_bytes: int = 2

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * self.dtype_bytes


def model_shape(model: Path) -> ModelShape:
    try:
        config = json.loads((model / "config.json").read_text())
    except OSError as error:
        raise BenchError(f"no model in {model} ({error}); run scripts/fetch_model.py or give --model") from None
    heads = config["num_attention_heads"]
    return ModelShape(
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads", heads),
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
    )


class Prompts:
    """Makes prompts; the same (name, tokens) always gives the same one, other names give others."""

    def __init__(self, model: Path, text: Path = PROSE) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._sentences = [line.strip() for line in text.read_text().splitlines() if line.strip()]
        if len(self._sentences) < 20:
            raise BenchError(f"{text} has {len(self._sentences)} lines; a prompt text needs 20 sentences, one a line")

    def make(self, name: str, tokens: int) -> list[int]:
        """Opens with a sentence that holds `name`, so that no two prompts share a first cache block."""
        chance = random.Random(f"{name}/{tokens}")
        found: list[int] = self._tokenizer.encode(f"Notes for the reader, copy {name} of {tokens}. ").ids
        while len(found) < tokens:
            sentences = self._sentences.copy()
            chance.shuffle(sentences)
            found += self._tokenizer.encode(" ".join(sentences) + " ", add_special_tokens=False).ids
        return found[:tokens]
