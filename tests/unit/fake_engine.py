"""Stands in for `python` in the launch scripts: a vLLM engine without the model. Not a test.

The scripts call it as they would call Python. It answers the question for the device, passes the warm-up on to the real
Python and, asked for vLLM's server, serves as much HTTP as the scripts use. What it was started with goes to
FAKE_ENGINE_RECORD. FAKE_ENGINE_ALONE: don't have the usual child that ignores SIGTERM. FAKE_ENGINE_DIES: start nothing,
but say so and exit with 7, if this is in the command line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "fake", "max_model_len": 4096}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        record(bodies=self.bodies)
        self._answer({"choices": [{"text": "x"}]})

    def _answer(self, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


known: dict[str, Any] = {}


def record(**facts: Any) -> None:
    known.update(facts)
    if path := os.environ.get("FAKE_ENGINE_RECORD"):
        part = Path(f"{path}.{os.getpid()}.part")  # two engines may record at once
        part.write_text(json.dumps(known))
        part.rename(path)


def serve(argv: list[str]) -> None:
    dies = os.environ.get("FAKE_ENGINE_DIES")
    if dies and dies in " ".join(argv):
        print("fake engine: no memory left for the model", flush=True)
        sys.exit(7)
    if not os.environ.get("FAKE_ENGINE_ALONE"):
        subprocess.Popen([sys.executable, "-c", STUBBORN])
    record(argv=argv, environ=dict(os.environ), pid=os.getpid())
    if os.environ.get("FAKE_ENGINE_IGNORES_TERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    host, port = (argv[argv.index(option) + 1] for option in ("--host", "--port"))
    if delay_s := float(os.environ.get("FAKE_ENGINE_LOADS_S", "0")):
        time.sleep(delay_s)
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()


def main() -> None:
    match sys.argv[1:]:
        case ["-c", *_]:
            print(os.environ.get("FAKE_ENGINE_DEVICE", "cpu"))
        case ["-m", "vllm.entrypoints.openai.api_server", *argv]:
            serve(argv)
        case argv:
            os.execv(sys.executable, [sys.executable, *argv])


if __name__ == "__main__":
    main()
