"""The digest of weights: of all their bytes, cached by what tells a changed file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub._revision import ResolvedRevision

from lmkv import weights
from lmkv.errors import ConfigError
from lmkv.weights import Located, file_digest, identity, locate, weights_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"\x01" * 300_000)
    (folder / "b.safetensors").write_bytes(b"\x02" * 10)
    (folder / "config.json").write_text("{}")
    return folder


def test_every_byte_and_every_name_count(model: Path, tmp_path: Path) -> None:
    first = weights_digest(str(model), None)
    assert len(first) == 16
    data = bytearray((model / "a.safetensors").read_bytes())
    data[123_456] ^= 1
    (model / "a.safetensors").write_bytes(data)
    changed = weights_digest(str(model), None)
    (model / "b.safetensors").rename(model / "c.safetensors")
    assert len({first, changed, weights_digest(str(model), None)}) == 3
    (model / "config.json").write_text("{ }")
    assert weights_digest(str(model / "a.safetensors"), None) != changed


def test_a_folder_without_weights_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text("{}")
    assert weights_digest(str(tmp_path), None) == ""


def test_how_weights_are_to_be_read_is_part_of_them(model: Path) -> None:
    first = weights_digest(model, None)
    (model / "quantize_config.json").write_text('{"bits": 4}')
    four = weights_digest(model, None)
    (model / "quantize_config.json").write_text('{"bits": 8}')
    assert len({first, four, weights_digest(model, None)}) == 3


COMMIT, OLDER = "c" * 40, "d" * 40


def hub(cache: Path, commit: str = COMMIT, content: bytes = b"weights", ref: str = "main") -> Path:
    """A snapshot as huggingface_hub lays it out."""
    folder = cache / "models--org--name"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    blob = folder / "blobs" / commit
    blob.write_bytes(content)
    file = folder / "snapshots" / commit / "model.safetensors"
    file.unlink(missing_ok=True)
    file.symlink_to(Path("../../blobs") / commit)
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


def test_a_hub_name_leads_to_its_snapshot(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    snapshot = hub(tmp_path)
    pointer = tmp_path / "models--org--name/refs/main"
    assert locate("org/name", None, environ) == Located(snapshot, hub=True, pointer=pointer)
    assert locate("org/name", COMMIT, environ) == Located(snapshot, hub=True)
    older = hub(tmp_path, OLDER, b"other", "refs/pr/4")
    found = locate("org/name", "refs/pr/4", environ)
    assert found is not None and found.path == older
    assert weights_digest(older, None) != weights_digest(snapshot, None)


def test_a_revision_that_carries_its_commit_wins_over_a_branch_that_has_moved(tmp_path: Path) -> None:
    """vLLM resolves the revision once; a download by another process moves refs/main afterwards."""
    loaded = hub(tmp_path)
    hub(tmp_path, OLDER, b"other")
    revision = ResolvedRevision(COMMIT, None, "org/name")
    assert revision == "main"
    assert locate("org/name", revision, {"HF_HUB_CACHE": str(tmp_path)}) == Located(loaded, hub=True)


def test_a_snapshot_is_named_like_a_folder_with_the_same_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    assert weights_digest(hub(tmp_path), None) == weights_digest(folder, None)


@pytest.mark.parametrize("name", ["org/name", "s3://bucket/name", "org/name/more", "gs://x"])
def test_what_is_not_on_this_host_is_not_found(tmp_path: Path, name: str) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert locate(name, None, environ) is None
    hub(tmp_path / "hub", ref="")
    assert locate(name, None, environ) is None
    (tmp_path / "hub/models--org--name/refs/main").write_text("")
    assert locate(name, None, environ) is None


@pytest.mark.parametrize(
    "environ",
    [
        {"HF_HUB_CACHE": "~/a"},
        {"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"},
        {"XDG_CACHE_HOME": "/c"},
        {"HUGGINGFACE_HUB_CACHE": "/d", "HF_HOME": "/b"},
        {"HF_HUB_CACHE": "$HF_HOME/e", "HF_HOME": "/b"},
        {},
    ],
)
def test_the_cache_is_where_huggingface_hub_looks_for_it(environ: dict[str, str]) -> None:
    names = ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    code = "from huggingface_hub.constants import HF_HUB_CACHE as c; print(c)"
    theirs = subprocess.run(
        [sys.executable, "-c", code], env=clean | environ, capture_output=True, text=True, check=True
    ).stdout.strip()
    ours = subprocess.run(
        [sys.executable, "-c", "import os; from lmkv.weights import hub_cache; print(hub_cache(os.environ))"],
        env=clean | environ, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert ours == theirs


def test_the_second_time_nothing_is_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = weights_digest(str(model), cache)

    def no_more(path: Path, read: object) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(weights, "_hash", no_more)
    assert weights_digest(str(model), cache) == first


@pytest.mark.parametrize("how", ["same-size", "same-mtime", "replaced"])
def test_a_changed_file_is_read_again(model: Path, tmp_path: Path, how: str) -> None:
    """Also when size and mtime were made the same again: ctime and inode tell."""
    cache, path = tmp_path / "cache", model / "b.safetensors"
    first, times = file_digest(path, cache), path.stat()
    if how == "replaced":
        other = model / "new"
        other.write_bytes(b"\x03" * 10)
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(path)
    else:
        path.write_bytes(b"\x03" * 10)
        if how == "same-mtime":
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path, cache) != first


@pytest.mark.parametrize("junk", ["", "{", "[]", '{"blake2b": 7}', '{"blake2b": "short"}'])
def test_a_damaged_cache_is_not_believed(model: Path, tmp_path: Path, junk: str) -> None:
    path, cache = model / "b.safetensors", tmp_path / "cache"
    first = file_digest(path, cache)
    (entry,) = cache.glob("*.json")
    assert json.loads(entry.read_text()) == {"blake2b": first} and entry.stem == identity(path)
    entry.write_text(junk)
    assert file_digest(path, cache) == first


def test_a_cache_that_cannot_be_written_is_none(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert weights_digest(str(model), tmp_path / "file" / "cache") == weights_digest(str(model), None)


def test_a_file_that_never_stops_changing_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model / "b.safetensors"
    monkeypatch.setattr(weights, "_hash", lambda p, read: p.write_bytes(os.urandom(20)) and "x")
    with pytest.raises(ConfigError, match="changed 3 times"):
        file_digest(path, None)


def test_a_broken_link_is_named(model: Path) -> None:
    (model / "z.safetensors").symlink_to(model / "gone")
    with pytest.raises(ConfigError, match="cannot be read"):
        weights_digest(str(model), None)


def test_progress_reaches_the_end(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    weights_digest(str(model), None, lambda done, total: seen.append((done, total)))
    assert max(seen) == (300_010, 300_010)
