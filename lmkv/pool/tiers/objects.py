"""The object tier: one self-checking object a page, in any store that `obstore` reaches.

Names are `<namespace>/<first two digits>/<chunk key>-<group>` below the URL's path, so nodes of several clusters can
share a bucket: equal keys are equal pages. Nothing is evicted here; a bucket has rules of its own for that.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from lmkv.errors import ConfigError
from lmkv.pool import faults
from lmkv.poolwire import NAMESPACE_BYTES, Tier

from .base import CorruptError, PageMeta, StoreTier, TierError
from .counts import Counts
from .record import (
    HEADER_BYTES,
    Header,
    associated,
    check_page,
    check_target,
    payload_digest,
    read_header,
    write_header,
)
from .sealing import Sealer
from .segments import sync_directory

ASKING_THREADS = 16
LISTED_AT_ONCE = 1000
RETRIES = 3
COUNTERS = (
    *("puts", "gets", "misses", "put_bytes", "got_bytes", "dropped", "evicted", "corrupt", "wrong_key", "torn"),
    "failed",
)
_DESCRIPTION = "description.json"
_NAME = re.compile(r"([0-9a-f]{32})/[0-9a-f]{2}/([0-9a-f]{32})-(\d{1,3})")


def object_name(key: bytes) -> str:
    namespace, chunk, group = key[:NAMESPACE_BYTES].hex(), key[NAMESPACE_BYTES:-1].hex(), key[-1]
    return f"{namespace}/{chunk[:2]}/{chunk}-{group}"


def object_key(name: str) -> bytes | None:
    """None: no page has that name."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[3]) > 255:
        return None
    return bytes.fromhex(match[1] + match[2]) + bytes([int(match[3])])


class ObjectTier(StoreTier):
    """Any thread. `used_bytes` is what this node has put since opening, less what it dropped."""

    tier: ClassVar[Tier] = Tier.OBJECT

    def __init__(
        self,
        url: str,
        *,
        sealer: Sealer | None = None,
        endpoint: str = "",
        region: str = "",
        allow_http: bool = False,
        timeout_s: float = 10.0,
    ) -> None:
        """`url`: s3://bucket/prefix, gs://, az://, file:///directory or memory://. What else a store needs
        (credentials) comes from its usual environment variables. `timeout_s` bounds a question to the store, retries
        included. Raises ConfigError."""
        self.url = url
        self._obstore = _obstore()
        self._directory = _directory(url)
        self._store = _open_store(url, self._directory, endpoint, region, allow_http, timeout_s)
        self._sealer = sealer
        self._key_id = sealer.key_id if sealer is not None else b""
        self._counts = Counts(*COUNTERS)
        self._threads = ThreadPoolExecutor(ASKING_THREADS, "lmkv-object")
        self._used_lock = threading.Lock()
        self._used_bytes = 0
        self._closed = False

    def put(self, key: bytes, meta: PageMeta, data: memoryview) -> None:
        page = check_page(key, meta, data)
        record = memoryview(bytearray(HEADER_BYTES + len(page)))
        payload = record[HEADER_BYTES:]
        if self._sealer is not None:
            seal = self._sealer.seal(associated(key, meta), page, payload)
        else:
            seal, payload[:] = None, page
        write_header(Header(key, meta, time.time_ns(), payload_digest(payload), seal), record)
        faults.point("object:before_put")
        try:
            self._put(object_name(key), record)
        except TierError:
            self._counts.add("failed")
            raise
        faults.point("object:put")
        self._counts.add("puts")
        self._counts.add("put_bytes", len(page))
        self._use(len(record))

    def get(self, key: bytes, into: memoryview) -> PageMeta | None:
        name = object_name(key)
        try:
            with self._errors(f"{name} cannot be read"):
                found = self._obstore.get(self._store, name)
                size: int = found.meta["size"]
                if size - HEADER_BYTES <= len(into.cast("B")):
                    record = memoryview(found.bytes())
                else:
                    record = memoryview(self._obstore.get_range(self._store, name, start=0, end=HEADER_BYTES))
        except _AbsentError:
            self._counts.add("misses")
            return None
        header = self._check(key, size, record)
        if header is None:
            raise self._corrupt(key)
        if header.key_id != self._key_id:
            self._counts.add("wrong_key")
            return None
        if not self._open(header, record[HEADER_BYTES:], check_target(into, header.meta.page_bytes)):
            raise self._corrupt(key)
        self._counts.add("gets")
        self._counts.add("got_bytes", header.meta.page_bytes)
        return header.meta

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of these are there, asked for at once. Raises TierError."""
        return [size is not None for size in self._sizes(keys)]

    def keys(self, namespace: bytes = b"") -> Iterator[bytes]:
        """The keys that begin so, from listings alone, in the order of their names. Raises TierError."""
        for listed in self._list(namespace):
            yield from (key for key, _ in listed)

    def drop(self, keys: Sequence[bytes]) -> int:
        sizes = self._sizes(keys)
        there = [(key, size) for key, size in zip(keys, sizes, strict=True) if size is not None]
        return self._delete(dict(there))

    def drop_namespace(self, namespace: bytes) -> int:
        return sum(self._delete(dict(listed)) for listed in self._list(namespace))

    def scan(self) -> Iterator[tuple[bytes, PageMeta]]:
        """As listed now, page by page of the listing, in the order of names (a store has no other). One small read an
        object: where only the keys are wanted, `keys` costs a thousandth."""
        for listed in self._list(b""):
            headers = self._threads.map(lambda found: self._read_header(*found), listed)
            for (key, _), header in zip(listed, headers, strict=True):
                if header is not None and header.key_id == self._key_id:
                    yield key, header.meta

    def describe(self, namespace: bytes, description: str) -> None:
        if self._description(namespace.hex()) != description:
            self._put(f"{namespace.hex()}/{_DESCRIPTION}", memoryview(description.encode()))

    def descriptions(self) -> dict[bytes, str]:
        with self._errors("namespaces cannot be listed"):
            found = self._obstore.list_with_delimiter(self._store)["common_prefixes"]
        names = [name for name in found if re.fullmatch(r"[0-9a-f]{32}", name)]
        texts = self._threads.map(self._description, names)
        return {bytes.fromhex(name): text for name, text in zip(names, texts, strict=True) if text is not None}

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def capacity_bytes(self) -> int:
        return 0

    def counters(self) -> dict[str, int]:
        return self._counts.read()

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown()

    # --- the store ---

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """What a store says as TierError, and as _AbsentError for what is not there."""
        if self._closed:
            raise TierError("the object tier is closed")
        try:
            yield
        except FileNotFoundError as error:
            raise _AbsentError(f"{self.url}: {what}: {_said(error)}", hint="is the bucket there?") from error
        except (OSError, self._obstore.exceptions.BaseError) as error:
            hint = "is the store reachable, and are its settings right?"
            raise TierError(f"{self.url}: {what}: {_said(error)}", hint=hint) from error

    def _put(self, name: str, record: memoryview) -> None:
        """`record` is given away: a store in memory keeps it."""
        with self._errors(f"{name} cannot be written"):
            self._obstore.put(self._store, name, record, use_multipart=False)
            if self._directory is not None:
                _sync(self._directory, name)

    def _list(self, namespace: bytes) -> Iterator[list[tuple[bytes, int]]]:
        """Keys and sizes."""
        prefix = namespace[:NAMESPACE_BYTES].hex() if len(namespace) >= NAMESPACE_BYTES else None
        with self._errors("objects cannot be listed"):
            for listed in self._obstore.list(self._store, prefix, chunk_size=LISTED_AT_ONCE):
                found = [(object_key(each["path"]), each["size"]) for each in listed]
                yield [(key, size) for key, size in found if key is not None and key.startswith(namespace)]

    def _sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        return list(self._threads.map(self._size, keys))

    def _size(self, key: bytes) -> int | None:
        try:
            with self._errors("an object cannot be looked up"):
                size: int = self._obstore.head(self._store, object_name(key))["size"]
                return size
        except _AbsentError:
            return None

    def _delete(self, sizes: dict[bytes, int]) -> int:
        """Returns how many."""
        names = [object_name(key) for key in sizes]
        with self._errors("objects cannot be deleted"):
            try:
                if names:
                    self._obstore.delete(self._store, names)
            except FileNotFoundError:
                # Somebody else was faster with one of them; some stores stop there.
                for name in names:
                    self._delete_one(name)
        self._counts.add("dropped", len(names))
        self._use(-sum(sizes.values()))
        return len(names)

    def _delete_one(self, name: str) -> None:
        try:
            self._obstore.delete(self._store, name)
        except FileNotFoundError:
            return

    def _description(self, namespace: str) -> str | None:
        try:
            with self._errors(f"the description of {namespace} cannot be read"):
                text = self._obstore.get(self._store, f"{namespace}/{_DESCRIPTION}").bytes()
            return bytes(text).decode("utf-8", "replace")
        except _AbsentError:
            return None

    def _read_header(self, key: bytes, size: int) -> Header | None:
        """None: gone, or not whole, and then it is deleted."""
        try:
            with self._errors("an object cannot be read"):
                if size > HEADER_BYTES:
                    block = self._obstore.get_range(self._store, object_name(key), start=0, end=HEADER_BYTES)
                    header = read_header(memoryview(block))
                    if header is not None and header.key == key and header.meta.page_bytes == size - HEADER_BYTES:
                        return header
                self._delete_one(object_name(key))
        except _AbsentError:
            return None
        self._counts.add("torn")
        return None

    # --- what is in an object ---

    def _check(self, key: bytes, size: int, record: memoryview) -> Header | None:
        header = read_header(record)
        if header is None or header.key != key or header.meta.page_bytes != size - HEADER_BYTES:
            return None
        whole = len(record) == size
        return header if not whole or payload_digest(record[HEADER_BYTES:]) == header.digest else None

    def _open(self, header: Header, payload: memoryview, target: memoryview) -> bool:
        if self._sealer is not None and header.seal is not None:
            return self._sealer.open(header.seal, associated(header.key, header.meta), payload, target)
        target[:] = payload
        return True

    def _corrupt(self, key: bytes) -> CorruptError:
        self._counts.add("corrupt")
        name = object_name(key)
        with self._errors(f"{name} is damaged and cannot be deleted"):
            self._delete_one(name)
        return CorruptError(
            f"{self.url}: {name} was damaged; it was deleted", hint="look at the store if this comes again"
        )

    def _use(self, size: int) -> None:
        with self._used_lock:
            self._used_bytes = max(0, self._used_bytes + size)


class _AbsentError(TierError):
    pass


def _obstore() -> Any:
    """Imported when an object tier is set up: it is an extra."""
    try:
        return importlib.import_module("obstore")
    except ImportError as error:
        raise ConfigError(f"an object tier needs obstore: {error}", hint="pip install 'lmkv[pool]'") from error


def _said(error: Exception) -> str:
    """Without the debug output that obstore adds."""
    return str(error).partition("\n")[0]


def _directory(url: str) -> Path | None:
    """Of a file:// URL."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    if parts.netloc or not parts.path.startswith("/"):
        raise ConfigError(f"{url!r} names no directory", hint="file:///absolute/path")
    return Path(unquote(parts.path))


def _open_store(
    url: str, directory: Path | None, endpoint: str, region: str, allow_http: bool, timeout_s: float
) -> Any:
    store = importlib.import_module("obstore.store")
    scheme = urlsplit(url).scheme
    try:
        if directory is not None:
            return store.LocalStore(directory, mkdir=True)
        if scheme == "memory":
            return store.MemoryStore()
        if scheme not in ("s3", "gs", "az"):
            raise ConfigError(f"{url!r} is no object store", hint="s3://, gs://, az://, file:/// or memory://")
        # A last try may begin when six tenths of the time are over, and lasts at most the other four.
        once, again = timedelta(seconds=timeout_s * 0.4), timedelta(seconds=timeout_s * 0.6)
        backoff = {"init_backoff": timedelta(seconds=timeout_s / 100), "max_backoff": again / 6, "base": 2}
        return store.from_url(
            url,
            config=_config(scheme, endpoint, region),
            client_options={"timeout": once, "connect_timeout": once, "allow_http": allow_http},
            retry_config={"max_retries": RETRIES, "retry_timeout": again, "backoff": backoff},
        )
    except (OSError, ValueError, TypeError, importlib.import_module("obstore.exceptions").BaseError) as error:
        raise ConfigError(f"the object store {url!r} cannot be opened: {_said(error)}") from error


def _config(scheme: str, endpoint: str, region: str) -> dict[str, Any]:
    config: dict[str, Any] = {"checksum_algorithm": "SHA256"} if scheme == "s3" else {}
    if endpoint:
        if scheme == "gs":
            raise ConfigError(f"gs:// takes no endpoint (got {endpoint!r})", hint="leave it out")
        config["endpoint"] = endpoint
    if region:
        if scheme != "s3":
            raise ConfigError(f"{scheme}:// takes no region (got {region!r})", hint="leave it out")
        config["region"] = region
    return config


def _sync(directory: Path, name: str) -> None:
    """A file that was put, and the names on the way to it, are on the disk. If it was dropped since, it need not be."""
    path = directory / name
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    for parent in (*path.parents[: len(Path(name).parents) - 1], directory):
        sync_directory(parent)
