"""`lmkv doctor`: what it says of a machine."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lmkv import kernels
from lmkv.cli import doctor, main
from lmkv.errors import LayoutError


def findings(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    return result.exit_code, {finding["what"]: finding for finding in json.loads(result.stdout)}


def test_this_machine_is_fine() -> None:
    status, found = findings()
    assert status == 0 and found["kernels, cpu"]["state"] in ("ok", "slow")
    assert "vLLM" in CliRunner().invoke(main, ["doctor"]).stdout


def test_nothing_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "loaded", {})
    status, found = findings()
    assert status == 0 and found["kernels, cpu"]["state"] == "slow"
    assert "nothing is compiled" in found["kernels, cpu"]["detail"] and "compiler" in found["kernels, cpu"]["hint"]


def test_a_wrong_kernel_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> list[str]:
        raise LayoutError("pack_pages on cpu is wrong", hint="rebuild")

    monkeypatch.setattr(kernels, "selftest", wrong)
    status, found = findings()
    assert status == 1 and found["kernels"]["state"] == "broken" and found["kernels"]["hint"] == "rebuild"


def test_another_vllm_is_broken_and_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules[doctor.__module__]
    monkeypatch.setattr(module, "_version", lambda name: "0.99.1" if name == "vllm" else "")
    status, found = findings()
    assert status == 1 and found["vLLM"]["state"] == "broken" and "0.99.1" in found["vLLM"]["detail"]
    assert found["nixl:// transport"]["state"] == "missing" and "pip install" in found["nixl:// transport"]["hint"]
