"""What an engine's weights are called, from vLLM's configuration and what lies on the host."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv import wire
from lmkv.errors import CompatError, ConfigError
from lmkv.ids import EngineName, Incarnation
from lmkv.vllm import identity
from lmkv.vllm.fingerprint import compare
from lmkv.vllm.identity import Weights, WeightsName, WeightSource, identify, weight_sources

from .real_vllm import model_folder, vllm_config

pytestmark = pytest.mark.timeout(600)  # importing vLLM and its first configuration may take a minute and more

US, THEM = Incarnation("aa" * 8), Incarnation("bb" * 8)


@pytest.fixture(autouse=True)
def started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of these tests are older than the process, as those of an engine are."""
    monkeypatch.setattr(identity, "process_start_s", lambda: time.time() + 60)


def with_weights(folder: Path, content: bytes = b"w") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def hub(cache: Path, commit: str) -> Path:
    folder = cache / "models--org--name"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def identified(model: str, environ: dict[str, str] | None = None, **more: Any) -> Weights:
    source = WeightSource(model, more.pop("revision", None), None)
    return identify((source,), environ or {}, more.pop("loaded_s", time.time() + 60), None)


def test_a_folder_and_a_snapshot_with_the_same_files_are_the_same(tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "folder")
    with_weights(hub(tmp_path / "hub", "c" * 40))
    one, other = identified(str(folder)), identified("org/name", {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert one == other and one.digest and not one.private
    with_weights(hub(tmp_path / "hub", "d" * 40), b"new")
    moved = identified("org/name", {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert moved.digest not in ("", one.digest)
    pinned = identified("org/name", {"HF_HUB_CACHE": str(tmp_path / "hub")}, revision="c" * 40)
    assert pinned == one


def test_two_engines_with_the_same_unresolved_name_are_not_the_same(tmp_path: Path) -> None:
    """The name alone says nothing: either may have another commit."""
    found = identified("org/name", {"HF_HUB_CACHE": str(tmp_path)})
    assert not found.digest and "'org/name' is no folder" in found.private and "'main'" in found.private


def test_folders_without_weight_files_are_not_the_same(tmp_path: Path) -> None:
    model_folder(tmp_path)
    assert "no weight files" in identified(str(tmp_path)).private


def test_files_that_vanish_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads them tells it; an engine with plain OSErrors would wait for its weights for ever."""

    def gone(paths: object) -> float:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(identity, "newest_s", gone)
    with pytest.raises(ConfigError, match="cannot be read"):
        identified(str(with_weights(tmp_path)))


def test_a_modelscope_name_is_not_looked_up_at_hugging_face(tmp_path: Path) -> None:
    with_weights(hub(tmp_path, "c" * 40))
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert identified("org/name", environ).digest
    assert identified("org/name", environ | {"VLLM_USE_MODELSCOPE": "True"}).private


def test_files_newer_than_what_was_loaded_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_weights(tmp_path / "folder")
    with_weights(hub(tmp_path / "hub", "c" * 40))
    environ, pointer = {"HF_HUB_CACHE": str(tmp_path / "hub")}, tmp_path / "hub/models--org--name/refs/main"
    before, after = time.time() - 60, time.time() + 60
    monkeypatch.setattr(identity, "process_start_s", lambda: before)
    assert "newer" in identified(str(folder)).private
    assert str(pointer) in identified("org/name", environ).private, "who knows what it was when vLLM looked"
    downloaded = identified("org/name", environ, revision="c" * 40, loaded_s=after)
    assert downloaded.digest, "blobs of a commit that this start has downloaded are what it has loaded"
    assert "newer" in identified("org/name", environ, revision="c" * 40, loaded_s=before).private


def test_a_replaced_link_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the link leads to may be old."""
    old = with_weights(tmp_path / "elsewhere") / "model.safetensors"
    limit_s = old.stat().st_ctime + 1e-4
    monkeypatch.setattr(identity, "process_start_s", lambda: limit_s)
    folder = tmp_path / "folder"
    folder.mkdir()
    link, until_s = folder / "model.safetensors", time.monotonic() + 10
    while not link.is_symlink() or link.lstat().st_ctime < limit_s:  # the clock of files has ticks of milliseconds
        link.unlink(missing_ok=True)
        link.symlink_to(old)
        assert time.monotonic() < until_s
    assert "newer" in identified(str(folder)).private
    assert identified(str(tmp_path / "elsewhere")).digest


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"load_format": "dummy"}, "'dummy' makes the weights up"),
        ({"load_format": "tensorizer"}, "'tensorizer' does not read"),
        ({"load_format": "runai_streamer"}, "'runai_streamer' does not read"),
        ({"model_weights": "s3://bucket/model"}, "s3://bucket/model"),
    ],
)
def test_what_is_loaded_from_elsewhere_is_private(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    """A folder with weight files does not help: they are not what is loaded. Equal seeds do not either."""
    folder = with_weights(model_folder(tmp_path))
    assert weight_sources(vllm_config(folder))[0].private == ""
    config = vllm_config(folder, **{key: value for key, value in given.items() if key == "load_format"})
    if "model_weights" in given:
        config.model_config.model_weights = given["model_weights"]
    found = identify(weight_sources(config), os.environ, time.time() + 60, None)
    assert not found.digest and why in found.private


def test_code_of_the_models_folder_counts_where_it_is_run(tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "m")
    code = folder / "modeling.py"

    def found(text: str, trusted: bool = True, where: str = "modeling.Model") -> Weights:
        code.write_text(text)
        model = SimpleNamespace(
            model=str(folder),
            revision=None,
            model_weights="",
            architectures=["X"],
            trust_remote_code=trusted,
            hf_config=SimpleNamespace(auto_map={"AutoConfig": "config.C", "AutoTokenizer": [where, None]}),
        )
        load = SimpleNamespace(load_format="auto", download_dir=None)
        config = SimpleNamespace(model_config=model, load_config=load, speculative_config=None)
        return identify(weight_sources(config), {}, time.time() + 60, None)

    one, other = found("x = 1"), found("x = 2")
    assert one.digest and other.digest and one != other and found("x = 1") == one
    assert found("x = 1", trusted=False) == found("x = 2", trusted=False) != one
    assert "org/code--modeling.Model" in found("x = 1", where="org/code--modeling.Model").private


def test_a_drafters_weights_count_if_it_has_kv(tmp_path: Path) -> None:
    more: dict[str, Any] = {"revision": None, "model_weights": "", "trust_remote_code": False}
    main = SimpleNamespace(model="a", architectures=["X"], **more)
    draft = SimpleNamespace(model=str(with_weights(tmp_path / "draft")), architectures=[], **more)
    load = SimpleNamespace(load_format="auto", download_dir=None)

    def config(kv: bool) -> Any:
        speculative = SimpleNamespace(uses_draft_kv_cache=lambda: kv, draft_model_config=draft, draft_load_config=None)
        return SimpleNamespace(model_config=main, load_config=load, speculative_config=speculative)

    assert [source.model for source in weight_sources(config(True))] == ["a", draft.model]
    assert [source.model for source in weight_sources(config(False))] == ["a"]
    main.model = str(with_weights(tmp_path / "main"))
    found = identify(weight_sources(config(True)), {}, time.time() + 60, None)
    with_weights(tmp_path / "draft", b"other")
    assert found.digest != identify(weight_sources(config(True)), {}, time.time() + 60, None).digest
    (tmp_path / "draft" / "model.safetensors").unlink()
    assert identify(weight_sources(config(True)), {}, time.time() + 60, None).private


# --- the name through an engine's life ---


def card(role: str, name: WeightsName) -> wire.EngineCard:
    return wire.EngineCard(
        EngineName(role), Incarnation(role), "tcp://h:1", role, {"weights": name.value}, {}, (128,), ()
    )


def named(incarnation: Incarnation, weights: Weights, on_reset: str = "new_epoch") -> WeightsName:
    name = WeightsName(incarnation, on_reset)
    name.known(weights)
    return name


def test_private_weights_pair_with_nobody_and_say_why() -> None:
    ours = named(US, Weights("", "load_format 'dummy' makes the weights up"))
    for theirs in (named(THEM, Weights("", "the same")), named(THEM, Weights("d"))):
        with pytest.raises(CompatError, match="load_format 'dummy'") as caught:
            compare(card("prefill", ours), card("decode", theirs))
        assert caught.value.field == "weights" and "serve a folder with weight files" in caught.value.hint
    assert ours.epoch and ours.epoch != named(THEM, Weights("", "the same")).epoch
    compare(card("prefill", named(US, Weights("d"))), card("decode", named(THEM, Weights("d"))))


def test_a_reset_makes_weights_private() -> None:
    ours, theirs = named(US, Weights("d")), named(THEM, Weights("d"))
    seen = {ours.epoch}
    for _ in range(2):
        assert ours.reset() and "reset" in ours.private
        with pytest.raises(CompatError, match="weights"):
            compare(card("prefill", ours), card("decode", theirs))
        seen.add(ours.epoch)
    assert theirs.reset() and len(seen) == 3
    with pytest.raises(CompatError, match="on_reset"):
        compare(card("prefill", ours), card("decode", theirs))
    assert ours.since_reset not in ("", theirs.since_reset)


def test_counted_resets_are_equal_when_they_are_as_many() -> None:
    ours, theirs = named(US, Weights("d"), "count"), named(THEM, Weights("d"), "count")
    assert ours.reset() and not ours.private
    with pytest.raises(CompatError):
        compare(card("prefill", ours), card("decode", theirs))
    assert theirs.reset() and ours.since_reset == theirs.since_reset != ""
    compare(card("prefill", ours), card("decode", theirs))
    assert ours.epoch != theirs.epoch, "pages outlive the engines, and a count would come again"


def test_kept_weights_stay_what_they_are() -> None:
    ours = named(US, Weights("d"), "keep")
    assert not ours.reset()
    assert (ours.value, ours.epoch, ours.private, ours.since_reset) == ("d", "", "", "")


def test_a_reset_before_the_weights_are_known_counts() -> None:
    name = WeightsName(US, "new_epoch")
    assert name.reset()
    name.known(Weights("d"))
    assert name.private and name.value != "d" and name.epoch
