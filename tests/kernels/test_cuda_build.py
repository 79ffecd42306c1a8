"""The CUDA library as it is built, without a GPU: what scripts/check_cuda.py finds, and what the library asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_cuda.py"
PTXAS = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_{arch}'
ptxas info    : Function properties for _Z1kv
    {stack} bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 0 barriers
"""
SASS = """\tarch = sm_{arch}
\t\tFunction : _Z1kv
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/              @!P0 LDG.E R4, desc[UR4][R2.64] ;
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """Built and checked."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build" / "cuda" / "liblmkv_cuda.so"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import check_cuda

    return check_cuda


@pytest.mark.nvcc
@pytest.mark.timeout(300)
def test_library_needs_torch_and_brings_its_cuda_runtime(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = [line.rsplit("[", 1)[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert "libtorch.so" in needed
    assert not [name for name in needed if name.startswith(("libcuda", "libc10", "libtorch_", "libpython"))]
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


# Torch for CPUs lacks one function that the library calls, so it is given one to load the library with.
STREAM = "int aoti_torch_get_current_cuda_stream(int index, void** stream) { *stream = 0; return index; }"
LOAD = """
import sys
import torch
from lmkv.kernels import ops
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    print(torch._C._dispatch_dump(f"lmkv::{name}"))
"""


@pytest.mark.nvcc
@pytest.mark.timeout(300)
def test_library_loads_and_registers_the_ops(library: Path, tmp_path: Path) -> None:
    """Every other symbol that it needs is in torch."""
    compiler, stub = shutil.which("cc"), tmp_path / "stream.so"
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "stream.c").write_text(STREAM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(stub), str(tmp_path / "stream.c")], check=True)
    names = ["convert_blocks", "pack_pages", "unpack_pages", "checksum_runs"]
    command = [sys.executable, "-c", LOAD, str(library), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LD_PRELOAD": str(stub)}
    )
    registered = [line for line in done.stdout.splitlines() if line.startswith("CUDA: ")]
    assert len(registered) == len(names), done.stdout + done.stderr
    assert [line for line in registered if "_cuda.cu" in line] == registered


def found(
    script: ModuleType,
    *,
    stack: int = 0,
    spilled: int = 0,
    registers: int = 40,
    name: str = "k<Packets<16, true>>",
) -> list[str]:
    """What the script says of a kernel that is like this on every architecture."""
    numbers = [arch.removeprefix("sm_") for arch in script.ARCHITECTURES]
    log = "".join(PTXAS.format(arch=n, stack=stack, spilled=spilled, registers=registers) for n in numbers)
    dump = "".join(SASS.format(arch=n) for n in numbers)
    said: list[str] = script.findings("_Z1kv", name, script.parse_ptxas(log), script.parse_sass(dump))
    return said


def test_spills_and_registers_are_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "WIDE_ACCESSES", 0)
    assert found(script) == []
    assert len(found(script, spilled=4)) == len(script.ARCHITECTURES)
    assert any("8 bytes of stack" in line for line in found(script, stack=8))
    assert any("65 registers, more than 64" in line for line in found(script, registers=65))


def test_narrow_accesses_are_found(script: ModuleType) -> None:
    loads, stores = ["LDG.E.128.CONSTANT", "IMAD"] * 4, ["STG.E.128"] * 4
    assert script.narrow(loads + stores) == []
    assert script.narrow(["STG.E.64", *loads, *stores]) == []
    assert script.narrow(loads[:6] + stores) == ["3 128-bit loads before the first store, fewer than 4"]
    assert script.narrow(loads + ["STG.E.64"] * 4) == ["0 128-bit stores, fewer than 4"]
    assert script.narrow(["LDG.E.128", "STG.E.128"] * 4) == ["1 128-bit loads before the first store, fewer than 4"]
    assert len(found(script)) == 2 * len(script.ARCHITECTURES)


def test_kernels_that_only_read_need_no_stores(script: ModuleType) -> None:
    assert script.narrow(["LDG.E.128"] * 4, writes=False) == []
    assert script.narrow(["LDG.E.64"] * 4, writes=False) == ["0 128-bit loads before the first store, fewer than 4"]
    assert len(found(script, name="checksum_kernel<SumWords<16>>")) == len(script.ARCHITECTURES)


def test_a_missing_architecture_is_found(script: ModuleType) -> None:
    assert len(script.findings("_Z1kv", "k", {}, {})) == len(script.ARCHITECTURES)


def test_without_nvcc_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["check_cuda.py"])
    assert script.main() == 0
    assert "no nvcc" in capsys.readouterr().out


def test_missing_tools_are_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "TOOLS", script.ROOT / "nowhere")
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(script.CheckError, match="cuobjdump and nvdisasm not found · pip install nvidia-cuda-cuobjdump"):
        script.path_with_tools()
