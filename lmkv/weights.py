"""The digest of a model's weights: of the whole content of its weight files, so that a changed file is another model.

Reading is slow (about 1 GB/s a thread), so each file's digest is cached under what tells a changed file: device, inode,
size, mtime and ctime. A file that changes while it is read is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import ConfigError

SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
THREADS = 8
_CHUNK_BYTES = 8 << 20
_TRIES = 3

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all), from any of the reading threads."""


def weight_files(model: Path) -> list[Path]:
    """The weight files in a model folder, or the one file that `model` is."""
    if model.is_file():
        return [model]
    return sorted(path for path in model.iterdir() if path.suffix in SUFFIXES)


def weights_digest(model: str, cache: Path | None, progress: Progress = lambda done, total: None) -> str:
    """16 hex digits over names and contents of all weight files. A model that is no folder or file here (a hub name)
    gives `name:<model>`, a folder without weight files `none`.

    `cache`: folder for the digests of files; None: no cache. Blocks while it reads. Raises ConfigError for a file that
    cannot be read or never stops changing.
    """
    path = Path(model)
    if not path.exists():
        return f"name:{model}"
    try:
        files = weight_files(path)
        total = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise ConfigError(f"the weights of {model} cannot be read: {error}", hint="check the model folder") from error
    if not files:
        return "none"
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


def newest_s(model: Path) -> float:
    """When a file of the model was last changed or replaced, seconds since the epoch. Raises OSError."""
    files = list(model.iterdir()) if model.is_dir() else [model]
    return max((file.stat().st_ctime for file in files), default=0.0)


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
