"""What a build makes of what it finds: torch or not, a compiler or not; and the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("cmake", path=f"{sys.prefix}/bin:{os.environ['PATH']}") is None, reason="no cmake"),
]


def run(*command: str, **env: str) -> str:
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path, **env}, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def configure(build: Path, *options: str, **env: str) -> str:
    return run("cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options, **env)


def test_without_torch_nothing_is_compiled(tmp_path: Path) -> None:
    said = configure(tmp_path, f"-DLMKV_TORCH_DIR={tmp_path}/none")
    assert "without compiled kernels" in said
    run("cmake", "--build", str(tmp_path))
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_nothing_is_compiled(tmp_path: Path) -> None:
    assert "no C++ compiler" in configure(tmp_path, CXX=f"{tmp_path}/no-such-compiler")


def test_a_wanted_but_missing_cuda_compiler_is_an_error(tmp_path: Path) -> None:
    if not list(ROOT.glob("csrc/cuda/*.cu")):
        pytest.skip("no CUDA sources")
    done = subprocess.run(
        [
            shutil.which("cmake", path=f"{sys.prefix}/bin:{os.environ['PATH']}") or "cmake",
            *("-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}", "-DLMKV_CUDA=ON"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDACXX": f"{tmp_path}/no-such-compiler"},
    )
    assert done.returncode != 0 and "LMKV_CUDA=OFF" in done.stderr


def test_the_wheel_holds_the_library_and_proves_itself(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    options = ["-C", "cmake.define.LMKV_CUDA=OFF", "-C", f"build-dir={tmp_path}/build", "-w", str(tmp_path)]
    run(*pip, *options, str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"lmkv/kernels/liblmkv_cpu.so", "lmkv/transport/base.py", "lmkv/py.typed"} <= names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu")) or "__pycache__" in name]
    said = selftest(tmp_path / "site")
    assert str(tmp_path) in said and "compiled, " in said


def test_without_a_library_the_reference_proves_itself(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lmkv", tmp_path / "lmkv", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    said = selftest(tmp_path)
    assert str(tmp_path) in said and "nothing compiled is loaded" in said


def selftest(site: Path) -> str:
    """What lmkv in this folder says, with the packages of this environment but without its .pth files (-S), which would
    find the installed sources instead."""
    proof = "import sys; sys.path[:0] = sys.argv[1:]; import lmkv.kernels as k; print(k.__file__, *k.selftest())"
    return run(sys.executable, "-S", "-c", proof, str(site), sysconfig.get_paths()["purelib"])
