"""The bodies of the GPU kernels on the CPU: builds csrc/tests/, and has lmkv.kernels run it instead of its own ops."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from lmkv.kernels import _load

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "shim"
LIBRARY = BUILD / "liblmkv_shim.so"
CONVERSIONS = ("convert_blocks", "pack_pages", "unpack_pages")
PACKETS = (16, 8, 4, 2, 1)


@pytest.fixture(scope="session")
def shim_library() -> Path:
    """Built and loaded: `torch.ops.lmkv_shim` is there."""
    if missing := [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]:
        pytest.skip(f"the kernels' bodies cannot be built: no {', '.join(missing)}")
    if not _is_current():
        _run("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *_options())
        _run("cmake", "--build", str(BUILD), "--target", "lmkv_shim", "--parallel", "1")
        LIBRARY.touch()
    _declare()
    torch.ops.load_library(str(LIBRARY))
    return LIBRARY


@contextmanager
def running(*, warps: int = 7, widest_packet: int = 16) -> Iterator[None]:
    """lmkv.kernels converts with the kernels' bodies, on a grid of `warps` warps; needs the fixture."""
    with ExitStack() as stack:
        for name in CONVERSIONS:
            op = functools.partial(getattr(torch.ops.lmkv_shim, name), warps=warps, widest_packet=widest_packet)
            stack.enter_context(mock.patch.object(torch.ops.lmkv, name, op))
        yield


def _is_current() -> bool:
    sources = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    return LIBRARY.is_file() and LIBRARY.stat().st_mtime >= max(p.stat().st_mtime for p in sources)


def _options() -> list[str]:
    torch_dir = Path(torch.__file__).parent
    return ["-DLMKV_SHIM=ON", "-DLMKV_CUDA=OFF", f"-DLMKV_TORCH_DIR={torch_dir}"]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}", pytrace=False)


@functools.cache
def _declare() -> None:
    for name in CONVERSIONS:
        schema = _load.SCHEMAS[name].replace(") -> ()", ", int warps, int widest_packet) -> ()")
        torch.library.define(f"lmkv_shim::{name}", schema)
    torch.library.define("lmkv_shim::deal", _load.SCHEMAS["convert_blocks"].replace("-> ()", "-> int[]"))
