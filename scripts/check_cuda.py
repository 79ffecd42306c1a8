#!/usr/bin/env python3
"""Checks the CUDA kernels without a GPU: builds liblmkv_cuda.so for every architecture and reads what came out of it.

From `ptxas -v`: no spills, no stack, not more registers than the launches count on. From the machine code (cuobjdump,
nvdisasm): kernels of 16-byte packets have 128-bit loads and stores, and all the loads that they keep in flight come
before the first store; those that only read have the loads. Without nvcc it says so and succeeds. Exit status 1:
something is wrong; 2: cuobjdump or nvdisasm is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
LIBRARY = BUILD / "liblmkv_cuda.so"
LOG = BUILD / "build.log"
TOOLS = ROOT / ".cache" / "cuda-tools"
PACKAGES = "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
MOST_REGISTERS = 64
"""With which kBlocksPerMultiprocessor of csrc/include/lmkv/gpu.h fit."""
WIDE = re.compile(r"Packets<16,")
WIDE_ACCESSES = 4
"""128-bit loads, and stores, that such a kernel has at least: Packets::kInFlight (lmkv/convert_body.h)."""
READS_WIDE = re.compile(r"SumWords<16>")
"""Kernels that only read, as many at once: SumWords::kInFlight (lmkv/runs_body.h)."""


class CheckError(Exception):
    """What went wrong, for the user; `status` is the script's."""

    def __init__(self, what: str, status: int = 1) -> None:
        super().__init__(what)
        self.status = status


@dataclass(frozen=True, slots=True)
class Usage:
    """What ptxas says of a kernel."""

    stack_bytes: int
    spill_bytes: int
    registers: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="build anew even if nothing has changed")
    fresh = parser.parse_args().fresh
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("check_cuda: there is no nvcc, so no CUDA source was checked")
        return 0
    try:
        wrong = check(nvcc, fresh)
    except CheckError as error:
        print(f"check_cuda: {error}", file=sys.stderr)
        return error.status
    for line in wrong:
        print(f"  ✗ {line}")
    return 1 if wrong else 0


def check(nvcc: str, fresh: bool) -> list[str]:
    """What is wrong, a line each; prints the table of kernels."""
    path = path_with_tools()
    build(nvcc, fresh)
    usage = parse_ptxas(LOG.read_text())
    code = parse_sass(run([str(shutil.which("cuobjdump", path=path)), "--dump-sass", str(LIBRARY)], PATH=path))
    names = demangled({kernel for _, kernel in usage})
    print(f"{'kernel':64} registers on {' '.join(ARCHITECTURES)}")
    for kernel, name in sorted(names.items(), key=lambda item: item[1]):
        registers = [usage[arch, kernel].registers for arch in ARCHITECTURES if (arch, kernel) in usage]
        print(f"{name:64} {' '.join(f'{n:3}' for n in registers)}")
    return [line for kernel, name in names.items() for line in findings(kernel, name, usage, code)]


def findings(
    kernel: str, name: str, usage: dict[tuple[str, str], Usage], code: dict[tuple[str, str], list[str]]
) -> list[str]:
    wrong = []
    for arch in ARCHITECTURES:
        used, instructions = usage.get((arch, kernel)), code.get((arch, kernel), [])
        if used is None or not instructions:
            wrong.append(f"{name} is not there for {arch}")
            continue
        if used.spill_bytes or used.stack_bytes:
            wrong.append(f"{name} for {arch}: {used.spill_bytes} bytes spilled, {used.stack_bytes} bytes of stack")
        if used.registers > MOST_REGISTERS:
            wrong.append(f"{name} for {arch}: {used.registers} registers, more than {MOST_REGISTERS}")
        if WIDE.search(name):
            wrong += [f"{name} for {arch}: {line}" for line in narrow(instructions)]
        if READS_WIDE.search(name):
            wrong += [f"{name} for {arch}: {line}" for line in narrow(instructions, writes=False)]
    return wrong


def narrow(instructions: list[str], writes: bool = True) -> list[str]:
    """What a kernel of 16-byte packets lacks: loads under way before it stores anything, and as many stores if it
    `writes`."""
    wide = [op for op in instructions if re.match(r"(LDG|STG)\.E\b.*\.128", op)]
    stores = [i for i, op in enumerate(wide) if op.startswith("STG")]
    loads = stores[0] if stores else len(wide)
    found = ((loads, "loads before the first store"), (len(stores) if writes else WIDE_ACCESSES, "stores"))
    return [f"{n} 128-bit {what}, fewer than {WIDE_ACCESSES}" for n, what in found if n < WIDE_ACCESSES]


def build(nvcc: str, fresh: bool) -> None:
    """LIBRARY and LOG, unless they are newer than all sources; one file at a time, so that LOG is in order."""
    sources = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if not fresh and LOG.is_file() and LOG.stat().st_mtime > max(p.stat().st_mtime for p in sources):
        return
    LOG.unlink(missing_ok=True)
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise CheckError(f"{sys.executable} has no torch, whose headers are needed · run it with the project's Python")
    options = ["-DLMKV_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DLMKV_TORCH_DIR={Path(torch.origin).parent}"]
    run(["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *options])
    LOG.write_text(run(["cmake", "--build", str(BUILD), "--target", "lmkv_cuda", "--clean-first", "--parallel", "1"]))


def path_with_tools() -> str:
    """PATH with cuobjdump and nvdisasm, from the environment's packages or TOOLS."""
    folders = [base / "nvidia" / "cu13" / "bin" for base in (Path(sysconfig.get_path("purelib")), TOOLS)]
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if shutil.which(tool, path=path) is None]
    if missing:
        hint = f"pip install {PACKAGES}, or with --target {TOOLS.relative_to(ROOT)}"
        raise CheckError(f"{' and '.join(missing)} not found · {hint}", status=2)
    return path


def parse_ptxas(log: str) -> dict[tuple[str, str], Usage]:
    """By architecture and mangled name."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return {
        (m["arch"], m["kernel"]): Usage(int(m["stack"]), int(m["stores"]) + int(m["loads"]), int(m["registers"]))
        for m in pattern.finditer(log)
    }


def parse_sass(dump: str) -> dict[tuple[str, str], list[str]]:
    """Opcodes by architecture and mangled name."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    arch = kernel = ""
    for line in dump.splitlines():
        if m := re.match(r"\s*arch = (\w+)", line):
            arch = m[1]
        elif m := re.match(r"\s*Function : (\w+)", line):
            kernel = m[1]
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            found[arch, kernel].append(m[1])
    return found


def demangled(kernels: set[str]) -> dict[str, str]:
    """Readable names by mangled ones, without namespaces and parameters."""
    order = sorted(kernels)
    if not order:
        raise CheckError(f"ptxas has reported no kernel; see {LOG}")
    readable = run(["c++filt", *order]).splitlines()
    short = [re.sub(r"\w+::|\(anonymous namespace\)::|^void ", "", name) for name in readable]
    return {kernel: name[: name.rindex("(")].replace(" >", ">") for kernel, name in zip(order, short, strict=True)}


def run(command: list[str], **environment: str) -> str:
    """Its output; CheckError with the end of it when the command fails."""
    try:
        done = subprocess.run(
            command,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    except FileNotFoundError as error:
        raise CheckError(f"{command[0]} is needed and not there") from error
    if done.returncode != 0:
        raise CheckError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
