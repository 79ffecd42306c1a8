"""The digest of a model's weights: of the whole content of its weight files, so that a changed file is another model.

A model is a folder, a file, or the name of a repository whose snapshot lies in the Hugging Face cache (`locate`).
Reading is slow (about 1 GB/s a thread), so each file's digest is cached under what tells a changed file: device, inode,
size, mtime and ctime. A file that changes while it is read is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
"""Settings that say how the weights are to be read, where they do not stand in config.json."""
THREADS = 8
_CHUNK_BYTES = 8 << 20
_TRIES = 3

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all), from any of the reading threads."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model's files lie on this host."""

    path: Path
    """The model's folder, or the one file that it is."""
    hub: bool = False
    """`path` is a snapshot in the Hugging Face cache: its files are blobs that are never changed under their name."""
    pointer: Path | None = None
    """The file that said which snapshot it is (a branch or tag); another process may have moved it."""


def locate(
    model: str, revision: str | None, environ: Mapping[str, str], download_dir: str | None = None
) -> Located | None:
    """The files of `model`: a path, or `ORG/NAME` at `revision` (a commit, branch or tag; None: main) in the Hugging
    Face cache. None if it is neither. A revision that carries its commit (`.resolved`, as vLLM's do) needs no pointer.

    `environ`: HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME are honoured. `download_dir` replaces the cache's folder.
    """
    path = Path(model).expanduser()
    if path.exists():
        return Located(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return None
    folder = hub_cache(environ, download_dir) / f"models--{model.replace('/', '--')}"
    commit, pointer = str(getattr(revision, "resolved", None) or revision or "main"), None
    if not (folder / "snapshots" / commit).is_dir():
        pointer = folder / "refs" / commit
        try:
            commit = pointer.read_text().strip()
        except (OSError, ValueError):
            return None
    snapshot = folder / "snapshots" / commit
    return Located(snapshot, hub=True, pointer=pointer) if commit and snapshot.is_dir() else None


def hub_cache(environ: Mapping[str, str], download_dir: str | None = None) -> Path:
    """The folder of the Hugging Face cache, found as huggingface_hub finds it."""
    if download_dir:
        return Path(download_dir)
    home = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{home}/huggingface"
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def weight_files(model: Path) -> list[Path]:
    """The weight files in a model folder, or the one file that `model` is."""
    if model.is_file():
        return [model]
    return sorted(path for path in model.iterdir() if path.suffix in SUFFIXES or path.name in QUANTIZATION_FILES)


def weights_digest(model: str | Path, cache: Path | None, progress: Progress = lambda done, total: None) -> str:
    """16 hex digits over names and contents of all weight files of the folder or file `model`; "" if it has none.

    `cache`: folder for the digests of files; None: no cache. Blocks while it reads. Raises ConfigError for a file that
    cannot be read or never stops changing.
    """
    path = Path(model)
    try:
        files = weight_files(path)
        total = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise ConfigError(f"the weights of {path} cannot be read: {error}", hint="check the model folder") from error
    if all(file.name in QUANTIZATION_FILES for file in files):
        return ""
    done = [0] * len(files)

    def one(index: int) -> str:
        def read(count: int) -> None:
            done[index] = count
            progress(sum(done), total)

        return file_digest(files[index], cache, read)

    with ThreadPoolExecutor(min(THREADS, len(files)), thread_name_prefix="lmkv-weights") as pool:
        digests = list(pool.map(one, range(len(files))))
    state = hashlib.blake2b(digest_size=8)
    for file, digest in zip(files, digests, strict=True):
        state.update(f"{file.name}:{digest};".encode())
    return state.hexdigest()


def file_digest(path: Path, cache: Path | None, read: Callable[[int], None] = lambda count: None) -> str:
    """32 hex digits over the content of one file. `read` is told how many bytes have been seen."""
    try:
        for _ in range(_TRIES):
            before = identity(path)
            known = _cached(cache, before)
            if known:
                read(path.stat().st_size)
                return known
            digest = _hash(path, read)
            if identity(path) == before:
                _keep(cache, before, digest)
                return digest
    except OSError as error:
        raise ConfigError(f"weight file {path} cannot be read: {error}", hint="check the model folder") from error
    raise ConfigError(
        f"weight file {path} changed {_TRIES} times while it was read", hint="let the download or the copy end first"
    )


def identity(path: Path) -> str:
    """What differs when the file has been changed or replaced. Symbolic links are followed: a hub's blobs are files."""
    s = path.stat()
    return f"{s.st_dev}-{s.st_ino}-{s.st_size}-{s.st_mtime_ns}-{s.st_ctime_ns}"


def newest_s(paths: Iterable[Path]) -> float:
    """When one of these files was last changed or replaced, seconds since the epoch. Raises OSError.

    A symbolic link counts as well as the file that it leads to.
    """
    return max((max(path.stat().st_ctime, path.lstat().st_ctime) for path in paths), default=0.0)


def process_start_s() -> float:
    """When this process began, seconds since the epoch: what was on disk before is what it has loaded."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def default_cache(environ: Mapping[str, str]) -> Path:
    """Where this user's caches are."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmkv" / "weights"


def _hash(path: Path, read: Callable[[int], None]) -> str:
    state, count = hashlib.blake2b(digest_size=16), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            state.update(buffer[:size])
            count += size
            read(count)
    return state.hexdigest()


def _cached(cache: Path | None, key: str) -> str:
    """Empty if it is not there or not readable: then it is computed."""
    if cache is None:
        return ""
    try:
        entry = json.loads((cache / f"{key}.json").read_text())
    except (OSError, ValueError):
        return ""
    digest = entry.get("blake2b") if isinstance(entry, dict) else None
    return digest if isinstance(digest, str) and len(digest) == 32 else ""


def _keep(cache: Path | None, key: str, digest: str) -> None:
    """A cache that cannot be written costs time, nothing else."""
    if cache is None:
        return
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache, prefix=".part-")
        with os.fdopen(handle, "w") as file:
            json.dump({"blake2b": digest}, file)
        Path(name).replace(cache / f"{key}.json")
