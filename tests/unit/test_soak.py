"""The soak's prompts, options and result; its engines are tested by tests/e2e/test_bursts.py, which shares its code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import soak

from tests.e2e.bursts import PREFIX_CHARACTERS, Judged, Tally, opener_of, prompts_of


def test_prompts_share_a_fresh_prefix_and_nothing_else() -> None:
    prompts, others = prompts_of("one", 8), prompts_of("two", 8)
    assert len({prompt[:PREFIX_CHARACTERS] for prompt in prompts}) == 1 and len(set(prompts)) == 8
    assert all(len(prompt) > PREFIX_CHARACTERS for prompt in prompts)
    assert prompts[0][:3] != others[0][:3] and prompts == prompts_of("one", 8)
    assert len({opener_of(f"one, {i}")[:20] for i in range(3)}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "direct,sideways"], "--modes: sideways unknown"),
        (["--requests", "0"], "--requests is 0"),
        (["--model", "large"], "invalid choice: 'large'"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.parse(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMKV_MODELS", str(tmp_path))
    with pytest.raises(SystemExit):
        soak.parse([])
    assert "run scripts/fetch_model.py" in capsys.readouterr().err


def test_the_result_counts_what_was_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-llama").mkdir()
    monkeypatch.setenv("LMKV_MODELS", str(tmp_path))
    options = soak.parse(["--modes", "direct,pool,direct"])
    assert options.modes == ("direct", "pool")
    judged = [Judged("p", "a", "b", verdict) for verdict in ("equal", "wrong", "tie", "equal")]
    result = soak.result_of(options, {"direct": Tally(judged, 2, 3, 1.0), "pool": Tally(judged[:1])})
    assert result["summary"] == {"model": "tiny-llama", "requests": 5, "wrong": 1}
    assert result["modes"]["direct"] | {"seconds": 0} == {
        "requests": 4, "wrong": 1, "ties": 1, "aborted": 2, "preemptions": 3, "seconds": 0,
    }  # fmt: skip
    assert [one["mode"] for one in result["wrong_answers"]] == ["direct"]
    assert len(soak.table(result).splitlines()) == 3
