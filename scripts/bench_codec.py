#!/usr/bin/env python3
"""What coding the KV cache costs in answers: greedy continuations of prompts whose cache went through coded pages.

For each prompt a model computes the cache once. It goes into a canonical page, through a codec and back, and the model
answers greedily from it. The answer is compared with the one from the same page without a codec.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from bench import stats
from bench.errors import BenchError, progress
from bench.prompts import PROSE

from lmkv.codec import CODECS, coded_pages
from lmkv.kernels import Cache, decode_pages, encode_pages
from lmkv.layout import Geometry, canonical_pages, page_bytes, vllm_cache

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "bfloat16"
QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "Who is the first person mentioned, and what does he or she do?",
    "Write a title for this text.",
    "List three objects that are mentioned in the text.",
    "Where does the story take place?",
    "Continue the text with two more sentences.",
    "What is the mood of this text?",
    "Summarise the text for a child.",
    "Which sentence is the most surprising, and why?",
    "Translate the first sentence into French.",
)


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    first_logits: torch.Tensor


class Subject:
    """The model, its prompts, and its cache as pages."""

    def __init__(self, folder: Path) -> None:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
        import transformers

        if not (folder / "config.json").is_file():
            raise BenchError(f"no model in {folder}; run scripts/fetch_model.py or give --model")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.train(False)

    def prompt(self, number: int) -> list[int]:
        """A chat turn: 10 to 40 sentences of prose and a question. The same number gives the same prompt."""
        chance = random.Random(number)
        sentences = [line.strip() for line in PROSE.read_text().splitlines() if line.strip()]
        chance.shuffle(sentences)
        text = " ".join(sentences[: chance.randint(10, 40)])
        content = f"{text}\n\n{QUESTIONS[number % len(QUESTIONS)]}"
        messages = [{"role": "user", "content": content}]
        turn = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(turn, add_special_tokens=False)["input_ids"])

    def prefill(self, prompt: Sequence[int]) -> Any:
        """The cache of all tokens but the last, which the answer begins with."""
        with torch.inference_mode():
            return self.model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values

    def answer(self, cache: Any, last: int, tokens: int) -> Answer:
        found: list[int] = []
        first = torch.empty(0)
        with torch.inference_mode():
            for _ in range(tokens):
                out = self.model(torch.tensor([[last]]), past_key_values=cache, use_cache=True)
                logits = out.logits[0, -1].float()
                first = logits if not found else first
                last = int(logits.argmax())
                found.append(last)
        return Answer(found, first)


def page_of(cache: Any) -> tuple[Cache, Geometry]:
    """The cache as one canonical page [H][L][K,V][N][D]; rows behind the last token are zero."""
    layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    heads, count, dims = layers[0][0].shape
    tokens = -(-count // 16) * 16
    model = vllm_cache("LBHNC", layers=len(layers), blocks=1, heads=heads, block_tokens=tokens, parts=(dims, dims))
    page = Cache.empty(canonical_pages(model, page_tokens=tokens))
    view = page.data.view(torch.bfloat16).view(heads, len(layers), 2, tokens, dims)
    for i, parts in enumerate(layers):
        for part, values in enumerate(parts):
            view[:, i, part, :count] = values
    return page, page.geometry


def through(cache: Any, codec: str) -> tuple[Any, int]:
    """A copy of the cache that went through a page (and its coded form), and the bytes of the page as it is stored."""
    page, geometry = page_of(cache)
    size = page_bytes(geometry)
    if codec != PLAIN:
        coded = Cache.empty(coded_pages(geometry))
        encode_pages(page, coded, codec)
        page = Cache.empty(geometry)
        decode_pages(coded, page, codec)
        size = page_bytes(coded.geometry)
    heads, layers = geometry.heads, geometry.layers
    view = page.data.view(torch.bfloat16).view(heads, layers, 2, geometry.block_tokens, geometry.parts[0])
    result = copy.deepcopy(cache)
    for i, layer in enumerate(result.layers):
        count = layer.keys.shape[2]
        layer.keys, layer.values = (view[None, :, i, part, :count].clone() for part in (0, 1))
    return result, size


def compare(ours: Answer, theirs: Answer) -> dict[str, float]:
    """`theirs` is the one without a codec."""
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs.tokens))
    moved = (ours.first_logits - theirs.first_logits).abs()
    return {"equal_tokens": same, "max_logit_move": float(moved.max()), "mean_logit_move": float(moved.mean())}


def run(subject: Subject, prompts: int, tokens: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {codec: [] for codec in CODECS}
    sizes: dict[str, int] = dict.fromkeys((PLAIN, *CODECS), 0)
    for number in range(prompts):
        prompt = subject.prompt(number)
        cache = subject.prefill(prompt)
        answers = {}
        for codec in (PLAIN, *CODECS):
            restored, size = through(cache, codec)
            sizes[codec] += size
            answers[codec] = subject.answer(restored, prompt[-1], tokens)
        for codec in CODECS:
            found[codec].append(compare(answers[codec], answers[PLAIN]))
        said = ", ".join(f"{codec} {found[codec][-1]['equal_tokens']:.0f}" for codec in CODECS)
        progress(
            f"prompt {number + 1} of {prompts}, {len(prompt)} tokens · of {tokens} tokens equal from the start: {said}"
        )
    return [_cell(codec, found[codec], sizes[codec] / sizes[PLAIN], tokens) for codec in CODECS]


def _cell(codec: str, rows: list[dict[str, float]], size: float, tokens: int) -> dict[str, Any]:
    equal = [row["equal_tokens"] for row in rows]
    return {
        "codec": codec,
        "prompts": len(rows),
        "tokens": tokens,
        "bytes_of_bfloat16": round(size, 4),
        "answers_equal": sum(n == tokens for n in equal),
        "first_token_equal": sum(n > 0 for n in equal),
        "equal_tokens_mean": round(sum(equal) / len(equal), 2),
        "max_logit_move": round(max(row["max_logit_move"] for row in rows), 3),
        "mean_logit_move": round(sum(row["mean_logit_move"] for row in rows) / len(rows), 4),
    }


def table(cells: list[dict[str, Any]]) -> Iterator[str]:
    yield "codec      bytes  first token  all tokens  equal from the start  |Δlogit| max  mean"
    for c in cells:
        first, whole = (f"{c[key]}/{c['prompts']}" for key in ("first_token_equal", "answers_equal"))
        equal = f"{c['equal_tokens_mean']:.1f} of {c['tokens']}"
        moved = f"{c['max_logit_move']:12.2f}  {c['mean_logit_move']:.3f}"
        yield f"{c['codec']:9} {c['bytes_of_bfloat16']:6.3f}  {first:>11}  {whole:>10}  {equal:>20}  {moved}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 prompts, 16 tokens")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    default = ROOT / "models" / "SmolLM2-135M-Instruct"
    parser.add_argument(
        "--model", type=Path, default=default, metavar="DIR", help="model folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    prompts, tokens = (4, 16) if options.quick else (20, 32)
    try:
        cells = run(Subject(options.model), prompts, tokens)
    except BenchError as error:
        print(f"bench_codec: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(cells)))
    if options.out is not None:
        summary = {f"{key}_{c['codec']}": c[key] for c in cells for key in ("answers_equal", "bytes_of_bfloat16")}
        result = {
            "benchmark": "codec",
            "machine": stats.machine(),
            "commit": stats.commit(ROOT),
            "versions": stats.versions(),
            "settings": {"model": options.model.name, "prompts": prompts, "tokens": tokens},
            "results": cells,
            "summary": summary,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        progress(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
