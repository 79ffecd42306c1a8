"""The digest of weights: of all their bytes, cached by what tells a changed file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lmkv import weights
from lmkv.errors import ConfigError
from lmkv.weights import file_digest, identity, weights_digest


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


def test_what_is_not_here_is_a_name() -> None:
    assert weights_digest("org/model", None) == "name:org/model"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert weights_digest(str(tmp_path), None) == "none"


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
