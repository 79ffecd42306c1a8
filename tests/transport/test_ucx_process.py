"""The conformance suite for ucx://, in an interpreter that has ucxx: NIXL and ucxx must never share a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = ("test_transport_conformance.py", "test_transport_failure.py", "test_ucx.py")


def interpreter() -> str:
    """LMKV_UCX_PYTHON, else .venv-ucx's, else this one where ucxx is installed beside us; skips where there is none."""
    candidates = [os.environ.get("LMKV_UCX_PYTHON"), str(ROOT / ".venv-ucx" / "bin" / "python"), sys.executable]
    for python in [c for c in candidates if c and os.access(c, os.X_OK)]:
        probe = subprocess.run([python, "-c", "import ucxx, pytest, xxhash"], capture_output=True, timeout=60)
        if probe.returncode == 0:
            return python
    pytest.skip("no interpreter with ucxx: run scripts/setup_ucx.sh, or set LMKV_UCX_PYTHON")


@pytest.mark.timeout(400)
def test_the_conformance_suite() -> None:
    # Installed beside us means that this session runs the suite for ucx itself.
    if (python := interpreter()) == sys.executable:
        pytest.skip("ucxx is installed here, so this session runs the suite itself")
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "ucx"]
    done = subprocess.run(
        [*command, *(str(Path(__file__).with_name(name)) for name in SUITE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=360,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_it_refuses_to_share_a_process_with_nixl() -> None:
    code = (
        "import sys, types; sys.modules['nixl'] = types.ModuleType('nixl')\n"
        "from lmkv.errors import SchemeError\n"
        "from lmkv.transport import open_transport\n"
        "try:\n    open_transport('ucx://', 'x')\n"
        "except SchemeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "nixl is in this process" in done.stdout
    assert done.stderr == ""
