#!/usr/bin/env python3
"""Waits for an engine's /health, sends it one long prompt, then says that it is ready. Used by the launch scripts.

The prompt is long because on some machines a process whose first bf16 forward on the CPU is short dies with SIGILL, and
a decode engine's first forward has just that shape. It also takes compiling and allocating out of the first request.
It is drawn at random: an engine that finds it in the pool, from another's warm-up, would compute only its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 300
ANSWER_TOKENS = 2
POLL_S = 0.25


class NotReady(Exception):
    """What happened · with which values · what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="the engine; if it ends, so does this")
    parser.add_argument("--timeout", type=float, required=True, help="seconds")
    parser.add_argument("--line", required=True, help="what to print when the engine is ready")
    parser.add_argument("--ready-file", default="", help="file to put the line in, too")
    options = parser.parse_args()
    url = options.url.replace("//0.0.0.0:", "//127.0.0.1:")
    deadline_s = time.monotonic() + options.timeout
    try:
        wait_for_health(url, options.pid, deadline_s)
        warm_up(url, deadline_s)
    except NotReady as error:
        print(f"warm-up: {error}", file=sys.stderr)
        return 4
    print(options.line, flush=True)
    if options.ready_file:
        put(Path(options.ready_file), options.line + "\n")
    return 0


def wait_for_health(url: str, pid: int, deadline_s: float) -> None:
    while not answers(url + "/health"):
        if not alive(pid):
            raise NotReady("the engine ended before it was ready · its log says why")
        if time.monotonic() >= deadline_s:
            raise NotReady(
                f"{url}/health has not answered in time · raise LMKV_START_TIMEOUT_S or read the engine's log"
            )
        time.sleep(POLL_S)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:  # refused, reset, timed out or an HTTP error: not yet
        return False


def alive(pid: int) -> bool:
    """False also for a zombie: the script that would reap it waits for us."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def warm_up(url: str, deadline_s: float) -> None:
    model = ask(url + "/v1/models", None, deadline_s)["data"][0]
    tokens = min(PROMPT_TOKENS, int(model.get("max_model_len") or PROMPT_TOKENS * 2) - ANSWER_TOKENS)
    prompt = random.choices(range(100, 300), k=tokens)
    body = {"model": model["id"], "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    ask(url + "/v1/completions", body, deadline_s)


def ask(url: str, body: dict[str, Any] | None, deadline_s: float) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=max(1.0, deadline_s - time.monotonic())) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise NotReady(f"{url} answered {error.code}: {said} · read the engine's log") from None
    except (OSError, ValueError) as error:
        raise NotReady(f"{url} failed: {error} · read the engine's log") from None


def put(path: Path, text: str) -> None:
    """Whole or not there: somebody polls for it."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    scratch.rename(path)


if __name__ == "__main__":
    sys.exit(main())
