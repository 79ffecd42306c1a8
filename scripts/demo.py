#!/usr/bin/env python3
"""Shows KV computed once and used twice: pushed from a prefill to a decode engine, then loaded by another one.

1. A controller, a pool node, a prefill engine, a decode engine and the router answer a long prompt; the ledger tells
   how the KV was pushed. Then the engines and the router are stopped. The pool node stays.
2. A plain vLLM engine and a second engine with the pool are started. The plain one computes the same prompt, the second
   loads it from the pool: both times to first token, and whether all three greedy answers are equal.

Exit status: 0 the KV was handed over, then loaded, and the answers are equal · 1 they are not, or it was not · 3
something could not be started or ended early · 130 stopped by Ctrl-C or SIGTERM. Logs lie in .run/.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import _ledger
from _asking import Answer, Loaded, ask_watched, counted, explain, gained, pages, wait_stored

from lmkv.errors import ConfigError
from lmkv.up import commands
from lmkv.up.children import Child, ChildError, children, raise_on_sigterm, stop, wait_until
from lmkv.up.places import Place, spread
from lmkv.up.probe import router_ready
from lmkv.up.progress import step

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
ENGINE_DEADLINE_S = 900.0
SERVICE_DEADLINE_S = 60.0
POOL_CAPACITY = "512MiB"
PRECISION = ("--dtype", "float32")
"""A greedy answer in bfloat16 can flip on the shape of a batch alone, and the second engine computes only the rest."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Control ports of engines lie 10000 above theirs."""

    router: int

    @property
    def prefill(self) -> int:
        return self.router + 100

    @property
    def decode(self) -> int:
        return self.router + 200

    @property
    def plain(self) -> int:
        return self.router + 300

    @property
    def second(self) -> int:
        return self.router + 400

    @property
    def pool(self) -> str:
        return f"tcp://127.0.0.1:{self.router + 10300}"

    @property
    def controller(self) -> str:
        return f"tcp://127.0.0.1:{self.router + 10500}"


@dataclass(frozen=True, slots=True)
class Handover:
    """The first part."""

    answer: Answer
    story: _ledger.Story
    told: dict[str, Any]
    pages: int
    """In the pool afterwards."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """The second part."""

    plain: Answer
    second: Answer
    loaded: Loaded

    @property
    def ratio(self) -> float:
        return self.plain.first_token_ms / max(self.second.first_token_ms, 0.1)


# --- starting ---------------------------------------------------------------------------------------------------------


def start_engine(name: str, role: str, port: int, place: Place, options: argparse.Namespace, ports: Ports) -> Child:
    shared = [] if role == "plain" else ["--name", name, "--pool", ports.pool, "--controller", ports.controller]
    words = ["--model", str(options.model), "--port", str(port), *shared, *PRECISION, *place.flags]
    return Child(name, commands.launch(role, *words), options.run, commands.engine_environ(place.environ))


def start_router(ports: Ports, options: argparse.Namespace) -> Child:
    words = ["--port", str(ports.router), "--prefill", _url(ports.prefill), "--decode", _url(ports.decode)]
    return Child("router", commands.lmkv("router", *words), options.run, ready_line="lmkv router ready at ")


def start_pool(ports: Ports, options: argparse.Namespace) -> list[Child]:
    """A controller and a node that serves the engines of this host."""
    told = commands.lmkv("controller", "--listen", ports.controller)
    node = commands.lmkv(
        *("pool", "--listen", ports.pool, "--controller", ports.controller),
        *("--capacity", POOL_CAPACITY, "--transport", "none"),
    )
    return [
        Child("controller", told, options.run, ready_line="lmkv controller ready at "),
        Child("pool", node, options.run, ready_line="lmkv pool ready at "),
    ]


def not_ready(started: Sequence[Child]) -> str:
    return ", ".join(child.name for child in started if not child.is_ready())


# --- the demo ---------------------------------------------------------------------------------------------------------


def run_pool(options: argparse.Namespace, ports: Ports, lasting: list[Child]) -> None:
    with step("starting a controller and a pool node") as current:
        lasting += start_pool(ports, options)
        wait_until(functools.partial(not_ready, lasting), lasting, SERVICE_DEADLINE_S, current)


def run_pair(options: argparse.Namespace, ports: Ports, running: list[Child]) -> Handover:
    """Both engines and the router, one request. Leaves nothing of them running."""
    router_url, request_id = _url(ports.router), f"demo-{uuid.uuid4().hex[:12]}"
    with step("starting a prefill and a decode engine") as current:
        for role, port, place in zip(("prefill", "decode"), (ports.prefill, ports.decode), spread(2), strict=True):
            running.append(start_engine(role, role, port, place, options, ports))
        wait_until(functools.partial(not_ready, list(running)), running, ENGINE_DEADLINE_S, current)
    with step("starting the router, pairing the engines") as current:
        running.append(start_router(ports, options))
        wait_until(functools.partial(router_ready, router_url), running, SERVICE_DEADLINE_S, current)
    before = pages(ports.pool)
    print(f"\nAnswer to {options.prompt.name}, streamed through the router:\n")
    answer = ask_watched(router_url, request_id, options, running, show=True)
    told = explain(router_url, request_id)
    story = _ledger.read(told, time.time() - time.monotonic())
    print(f"\n\nLedger of request {request_id} (GET {router_url}/explain/{request_id})\n")
    print("\n".join(_ledger.render(story)) + "\n", flush=True)
    with step("storing what was computed in the pool") as current:
        there = wait_stored(ports.pool, before, answer.prompt_tokens)
        current.done = f"{there - before} pages"
    with step("stopping the engines and the router; the pool node stays"):
        stop(running)
    return Handover(answer, story, told, there)


def run_reuse(options: argparse.Namespace, ports: Ports, running: list[Child]) -> Reuse:
    """The same question to a vLLM engine that has never heard of lmkv, and to a new one that finds the KV in the pool.

    Each has as many cores as the prefill engine had, and is asked alone.
    """
    with step("starting a plain vLLM engine, and a second engine with the pool") as current:
        for name, role, port, place in (
            ("plain", "plain", ports.plain, spread(2)[0]),
            ("second", "engine", ports.second, spread(2)[1]),
        ):
            running.append(start_engine(name, role, port, place, options, ports))
        wait_until(functools.partial(not_ready, list(running)), running, ENGINE_DEADLINE_S, current)
    with step("asking the plain engine the same: it computes"):
        plain = ask_watched(_url(ports.plain), "demo-plain", options, running, show=False)
    control = f"tcp://127.0.0.1:{ports.second + 10000}"
    before = counted(control)
    with step("asking the second engine the same: it loads"):
        second = ask_watched(_url(ports.second), "demo-second", options, running, show=False)
    loaded = gained(control, before)
    with step("stopping them"):
        stop(running)
    return Reuse(plain, second, loaded)


def judge(handover: Handover, reuse: Reuse, run: Path) -> int:
    ours, story, loaded = handover.answer, handover.story, reuse.loaded
    print(f"\nfirst token   {ours.first_token_ms:6.0f} ms  prefill and decode engine, {story.tokens} tokens pushed")
    print(f"              {reuse.plain.first_token_ms:6.0f} ms  one plain engine, all computed")
    print(
        f"              {reuse.second.first_token_ms:6.0f} ms  second engine, {loaded.tokens} of "
        f"{reuse.second.prompt_tokens} tokens from the pool: {reuse.ratio:.1f} times as fast as the plain one"
    )
    equal = same_answers({"pushed": ours, "plain": reuse.plain, "loaded": reuse.second})
    if not story.handed_over:
        print(f"handover      NONE: {story.why_not or 'no bytes were pushed'} · read the logs in {run}")
    if not used_pool(loaded):
        print(f"pool          NO HIT: the second engine has loaded {loaded.tokens} tokens · read {run}/second.log")
    return 0 if equal and story.handed_over and used_pool(loaded) else 1


def used_pool(loaded: Loaded) -> bool:
    return loaded.hits > 0 and loaded.tokens > 0


def same_answers(answers: dict[str, Answer]) -> bool:
    """Says it; where two part, shows both."""
    plain = answers["plain"]
    others = {name: answer for name, answer in answers.items() if answer.text != plain.text}
    if not others:
        print(f"answers       EQUAL, all {len(answers)} ({plain.answer_tokens} tokens, greedy)")
        return True
    for name, answer in others.items():
        ends = min(len(answer.text), len(plain.text))
        same = next((i for i in range(ends) if answer.text[i] != plain.text[i]), ends)
        print(f"answers       DIFFERENT from character {same} on:")
        for whose, text in ((name, answer.text), ("plain", plain.text)):
            print(f"  {whose:6} …{text[max(0, same - 30) : same + 60]!r}")
    return False


def demo(options: argparse.Namespace) -> int:
    ports = Ports(options.base_port)
    with children() as lasting, children() as running:
        run_pool(options, ports, lasting)
        handover = run_pair(options, ports, running)
        reuse = run_reuse(options, ports, running)
    status = judge(handover, reuse, options.run)
    if options.json:
        result = {
            "equal": handover.answer.text == reuse.plain.text == reuse.second.text,
            "summary": handover.story.summary(),
            "pool": {**asdict(reuse.loaded), "pages": handover.pages, "ratio": round(reuse.ratio, 2)},
            "lmkv": asdict(handover.answer),
            "plain": asdict(reuse.plain),
            "second": asdict(reuse.second),
            "explain": handover.told,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written       {options.json}")
    return status


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    models = Path(os.environ.get("LMKV_MODELS") or ROOT / "models")
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=models / "SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--prompt", type=Path, default=SCRIPTS / "demo_prompt.txt", help="text file")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the answer (default: 64)")
    parser.add_argument(
        "--base-port", type=int, default=8000, help="router here, engines 100 to 400 above (default: 8000)"
    )
    parser.add_argument("--run", type=Path, default=ROOT / ".run", help="folder for logs (default: .run)")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(argv)
    for path in (options.model, options.prompt):
        if not path.exists():
            parser.error(f"{path} does not exist · run scripts/fetch_model.py, or name another")
    return options


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    options.run.mkdir(parents=True, exist_ok=True)
    raise_on_sigterm()
    try:
        return demo(options)
    except (ChildError, ConfigError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"\ndemo: {error} · read the logs in {options.run}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"\ndemo: stopped; nothing is left running · logs in {options.run}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
