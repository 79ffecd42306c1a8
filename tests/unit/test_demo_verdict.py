"""What the demo says and its exit status, with engines that are only answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import _children
import demo
from _children import Child

EXPLAIN = {
    "mode": "pd",
    "arrived_unix_ms": 1,
    "attempts": [
        {
            "prefill": "p",
            "decode": "d",
            "engines": {
                "prefill": {"ranks": {"0": {"bytes": 4096, "writes": 2}}},
                "decode": {"prompt_tokens": 10, "first_token": 0, "ranks": {"0": {}}},
            },
        }
    ],
}


@pytest.fixture
def run_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    def idle(name: str) -> Child:
        return Child(name, ["sleep", "60"], tmp_path)

    def run(ours: str, plain: str, explain: dict[str, Any] = EXPLAIN) -> int:
        def ask(url: str, request_id: str, options: Any, show: Callable[[str], None]) -> demo.Answer:
            text = plain if request_id == "demo-plain" else ours
            show(text)
            return demo.Answer(text, 10, 3, 5.0, 9.0)

        monkeypatch.setattr(demo, "start_engine", lambda role, *_: idle(role))
        monkeypatch.setattr(demo, "start_router", lambda *_: idle("router"))
        monkeypatch.setattr(demo, "engines_ready", lambda _: "")
        monkeypatch.setattr(demo, "router_ready", lambda _: "")
        monkeypatch.setattr(demo, "raise_on_sigterm", lambda: None)
        monkeypatch.setattr(demo, "get_json", lambda _: explain)
        monkeypatch.setattr(demo, "ask", ask)
        return demo.main(["--model", str(tmp_path), "--run", str(tmp_path), "--json", str(tmp_path / "out.json")])

    return run


def test_equal_answers_after_a_handover(
    run_demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("the tide", "the tide") == 0
    said = capsys.readouterr().out
    assert "the tide\n" in said
    assert "pushed    10 tokens · 0.0 MB · 2 writes" in said
    assert "answers       EQUAL (3 tokens, greedy)" in said
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["equal"] is True
    assert written["summary"]["pushed_bytes"] == 4096


def test_different_answers_are_shown_where_they_part(
    run_demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("the tide rises", "the tide falls") == 1
    assert "DIFFERENT from character 9" in capsys.readouterr().out


def test_an_answer_cut_short_is_different(run_demo: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("the tide", "the tide falls") == 1
    assert "DIFFERENT from character 8" in capsys.readouterr().out


def test_equal_answers_without_a_handover_are_no_success(
    run_demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("a", "a", {"mode": "aggregated", "aggregated_why": "no pair", "attempts": []}) == 1
    assert "handover      NONE: no pair" in capsys.readouterr().out


def test_an_engine_that_broke_off_ends_all(
    run_demo: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Child] = []
    real = _children.Child.__init__

    def remember(self: Child, *arguments: Any) -> None:
        real(self, *arguments)
        started.append(self)

    monkeypatch.setattr(Child, "__init__", remember)

    def explain_fails(url: str, request_id: str) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(demo, "explain", explain_fails)
    assert run_demo("a", "a") == 3
    assert "Connection reset by peer" in capsys.readouterr().err
    assert [child.process.poll() is None for child in started] == [False, False, False]
