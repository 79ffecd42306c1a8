"""What only nixl:// has: options, progress modes, the fall back. In processes of their own, as nixl is loaded there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import why_absent

if reason := why_absent("lmkv.transport.nixl"):
    pytest.skip(f"nixl cannot be imported: {reason}", allow_module_level=True)


def run(script: str, **env: str) -> list[str]:
    """The lines a fresh interpreter prints for `script`."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    # UCX writes its own log to stdout, each line with a time in brackets.
    return [line for line in done.stdout.splitlines() if not line.startswith("[")]


def test_options() -> None:
    lines = run(
        """
from lmkv.errors import ConfigError
from lmkv.transport import open_transport
for url in ("nixl://host:1", "nixl://?spin=1", "nixl://?progress=spin", "nixl://?threads=x", "nixl://?threads=65"):
    try:
        open_transport(url, "o")
    except ConfigError as error:
        print(error.code)
for url in ("nixl://", "nixl://?progress=event&threads=2&split_batch_size=8"):
    t = open_transport(url, "o")
    print(t.progress)
    t.close()
"""
    )
    assert lines == ["LMKV-C100"] * 5 + ["poll", "event"]


def test_event_progress_does_not_spin() -> None:
    (cpu_s,) = run(
        """
import time
from lmkv.transport import open_transport
t = open_transport("nixl://?progress=event&threads=2", "idle")
before, begin = time.process_time(), time.monotonic()
time.sleep(1.0)
print((time.process_time() - before) / (time.monotonic() - begin))
t.close()
"""
    )
    # As shipped, the progress thread takes a whole core.
    assert float(cpu_s) < 0.3


def test_falls_back_to_polling_where_the_delay_cannot_be_set() -> None:
    lines = run(
        """
import logging
seen = []
class Keep(logging.Handler):
    def emit(self, record):
        seen.append(record.getMessage())
logging.getLogger("lmkv").addHandler(Keep())
import lmkv.transport.nixl as nixl
from lmkv.transport import nixl_agent
nixl_agent._event_possible = lambda bindings: False
t = nixl.NixlTransport("f", options={"progress": "event"})
print(t.progress, len(seen), "falls back" in seen[0])
t.close()
nixl_agent._event_possible = lambda bindings: True
config = nixl._bindings.nixlAgentConfig
class Wrapper:
    @staticmethod
    def nixl_agent_config(**kwargs):
        return nixl._real.nixl_agent_config(**kwargs)
    @staticmethod
    def nixl_agent(name, conf):
        # A wrapper that no longer goes through the bindings' name: the delay never reaches it.
        nixl._bindings.nixlAgentConfig, patched = config, nixl._bindings.nixlAgentConfig
        try:
            return nixl._real.nixl_agent(name, nixl._real.nixl_agent_config(enable_prog_thread=False, backends=[]))
        finally:
            nixl._bindings.nixlAgentConfig = patched
nixl._real, nixl._api = nixl._api, Wrapper
t = nixl.NixlTransport("g", options={"progress": "event"})
print(t.progress, nixl._bindings.nixlAgentConfig is config)
t.close()
"""
    )
    assert lines == ["poll 1 True", "poll True"]


def test_importing_it_leaves_the_process_as_it_was() -> None:
    lines = run(
        """
import logging, os, sys
import lmkv.transport
print(any(name.startswith("nixl") for name in sys.modules))
import lmkv.transport.nixl
print("torch" in sys.modules)
print(logging.raiseExceptions, os.environ["UCX_RCACHE_MAX_UNRELEASED"], "UCX_RNDV_THRESH" in os.environ)
""",
        UCX_RCACHE_MAX_UNRELEASED="77",
    )
    assert lines == ["False", "False", "True 77 False"]


def test_what_nixl_says_is_typed() -> None:
    """Foreign metadata, memory that NIXL refuses, a plug-in that does not start."""
    lines = run(
        """
import numpy as np
from lmkv.errors import LmkvError
from lmkv.transport import Region, open_transport
from lmkv.transport.common import encode_export
from lmkv.transport.base import MemoryKind
t = open_transport("nixl://", "a")
u = open_transport("nixl://", "b")
memory = np.zeros(64, np.uint8)
region = Region(memory.ctypes.data, 64, owner=memory)
u.register(region)
def attempt(f, *args):
    try:
        f(*args)
        print("accepted")
    except LmkvError as error:
        print(type(error).__name__)
attempt(t.connect, encode_export("nixl", "c", [region], b"not metadata"))
attempt(t.connect, encode_export("nixl", "c", [region], u._agent.get_agent_metadata()))
attempt(t.connect, t.export())
attempt(t.register, Region(4096, 0))
attempt(t.connect, u.export())
t.close(); u.close()
attempt(t.register, region)
import os
os.environ["UCX_TLS"] = "nonsense"
attempt(open_transport, "nixl://", "d")
"""
    )
    assert lines == [
        "ConnectError",
        "ConnectError",
        "ConnectError",
        "RegistrationError",
        "accepted",
        "RegistrationError",
        "SchemeError",
    ]
