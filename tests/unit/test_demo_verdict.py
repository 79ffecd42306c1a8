"""What the demo says and its exit status, with engines that are only answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import _ledger
import demo
from _asking import Answer, Loaded

from lmkv.up.children import Child

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

LOADED = Loaded(1, 8)


@pytest.fixture
def run_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    def idle(name: str) -> Child:
        return Child(name, ["sleep", "60"], tmp_path)

    def run(
        ours: str, plain: str, explain: dict[str, Any] = EXPLAIN, second: str | None = None, loaded: Loaded = LOADED
    ) -> int:
        texts = {"demo-plain": (plain, 9.0), "demo-second": (ours if second is None else second, 3.0)}

        def ask(url: str, request_id: str, options: Any, watched: Any, show: bool) -> Answer:
            text, first_ms = texts.get(request_id, (ours, 5.0))
            if show:
                print(text)
            return Answer(text, 10, 3, first_ms, 19.0)

        monkeypatch.setattr(demo, "start_pool", lambda *_: [idle("controller"), idle("pool")])
        monkeypatch.setattr(demo, "start_engine", lambda name, *_: idle(name))
        monkeypatch.setattr(demo, "start_router", lambda *_: idle("router"))
        monkeypatch.setattr(demo, "not_ready", lambda _: "")
        monkeypatch.setattr(demo, "router_ready", lambda _: "")
        monkeypatch.setattr(demo, "raise_on_sigterm", lambda: None)
        monkeypatch.setattr(demo, "explain", lambda *_: explain)
        monkeypatch.setattr(demo, "ask_watched", ask)
        monkeypatch.setattr(demo, "pages", lambda _: 2)
        monkeypatch.setattr(demo, "wait_stored", lambda *_: 17)
        monkeypatch.setattr(demo, "counted", lambda _: Loaded(0, 0))
        monkeypatch.setattr(demo, "gained", lambda *_: loaded)
        return demo.main(["--model", str(tmp_path), "--run", str(tmp_path), "--json", str(tmp_path / "out.json")])

    return run


def test_equal_answers_after_a_handover_and_a_load(
    run_demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("the tide", "the tide") == 0
    said = capsys.readouterr().out
    assert "the tide\n" in said
    assert "pushed    10 tokens · 0.0 MB · 2 writes" in said
    assert "8 of 10 tokens from the pool: 3.0 times as fast as the plain one" in said
    assert "answers       EQUAL, all 3 (3 tokens, greedy)" in said
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["equal"] is True
    assert written["summary"]["pushed_bytes"] == 4096
    assert written["pool"] == {"hits": 1, "tokens": 8, "pages": 17, "ratio": 3.0}


def test_different_answers_are_shown_where_they_part(
    run_demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("the tide rises", "the tide falls") == 1
    said = capsys.readouterr().out
    assert said.count("DIFFERENT from character 9") == 2
    assert "pushed" in said
    assert "EQUAL" not in said


def test_an_answer_cut_short_is_different(run_demo: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("the tide", "the tide falls") == 1
    assert "DIFFERENT from character 8" in capsys.readouterr().out


def test_loaded_kv_that_changes_the_answer_is_seen(
    run_demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("the tide", "the tide", second="the tile") == 1
    said = capsys.readouterr().out
    assert said.count("DIFFERENT from character 6") == 1
    assert "loaded …'the tile'" in said
    assert json.loads((tmp_path / "out.json").read_text())["equal"] is False


@pytest.mark.parametrize("loaded", [Loaded(0, 0), Loaded(1, 0)])
def test_equal_answers_without_a_hit_are_no_success(
    run_demo: Callable[..., int], capsys: pytest.CaptureFixture[str], loaded: Loaded
) -> None:
    assert run_demo("a", "a", loaded=loaded) == 1
    assert "pool          NO HIT" in capsys.readouterr().out


def test_equal_answers_without_a_handover_are_no_success(
    run_demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("a", "a", {"mode": "aggregated", "aggregated_why": "no pair", "attempts": []}) == 1
    assert "handover      NONE: no pair" in capsys.readouterr().out


def test_an_engine_that_broke_off_ends_all(
    run_demo: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Child] = []
    real = Child.__init__

    def remember(self: Child, *arguments: Any, **more: Any) -> None:
        real(self, *arguments, **more)
        started.append(self)

    monkeypatch.setattr(Child, "__init__", remember)

    def explain_fails(*_: object) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(_ledger, "read", explain_fails)
    assert run_demo("a", "a") == 3
    assert "Connection reset by peer" in capsys.readouterr().err
    assert [child.process.poll() is None for child in started] == [False] * 5
