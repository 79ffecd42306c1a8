"""Tiers to test: each of them, opened again as often as a test likes, and damaged on purpose."""

from __future__ import annotations

import os
import random
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
import pytest
from moto.server import ThreadedMotoServer

from lmkv.pool.tiers.base import PageMeta, StoreTier
from lmkv.pool.tiers.disk import DiskTier
from lmkv.pool.tiers.objects import ObjectTier, object_name
from lmkv.pool.tiers.sealing import Sealer

MIB = 1 << 20
KEY_BYTES = 33
SEALER = Sealer(bytes(range(32)))


def key_of(number: int, namespace: int = 0) -> bytes:
    """Scattered like digests, and known again."""
    chunk = random.Random(f"{namespace}/{number}").randbytes(16)
    return bytes([namespace]) * 16 + chunk + bytes([number % 7])


def data_of(key: bytes, size: int, version: int = 0) -> bytes:
    return random.Random(key + bytes([version])).randbytes(size)


def meta_of(data: bytes, heads: int = 4) -> PageMeta:
    return PageMeta(len(data), tuple(hash((data[:64], head)) & (1 << 64) - 1 for head in range(heads)))


def put(tier: StoreTier, key: bytes, size: int = 70_001, version: int = 0) -> bytes:
    data = data_of(key, size, version)
    tier.put(key, meta_of(data), memoryview(data))
    return data


def get(tier: StoreTier, key: bytes, room: int = 4 * MIB) -> bytes | None:
    """The page's bytes, its meta checked."""
    into = bytearray(room)
    meta = tier.get(key, memoryview(into))
    if meta is None:
        return None
    data = bytes(into[: meta.page_bytes])
    assert meta == meta_of(data)
    return data


def flip(path: Path, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
        os.fsync(file.fileno())


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """`work(0)` to `work(count - 1)` at once; raises what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


class Bed:
    """One place that a tier keeps its pages in."""

    persistent = True

    def __init__(self, sealer: Sealer | None) -> None:
        self.sealer = sealer
        self.tiers: list[StoreTier] = []

    def open(self) -> Any:
        tier = self.make()
        self.tiers.append(tier)
        return tier

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()

    def make(self) -> StoreTier:
        raise NotImplementedError

    def flip(self, tier: Any, key: bytes, offset: int) -> None:
        """Turn a bit of the page's record; negative offsets are from its end."""
        raise NotImplementedError

    def cut(self, tier: Any, key: bytes, size: int) -> None:
        """Leave only `size` bytes of the page's record."""
        raise NotImplementedError


@dataclass
class DiskPlace:
    directory: Path
    capacity_bytes: int = 0
    segment_bytes: int = 2 * MIB
    direct: bool | None = None
    evicted: list[bytes] = field(default_factory=list)


class DiskBed(Bed):
    def __init__(self, place: DiskPlace, sealer: Sealer | None) -> None:
        super().__init__(sealer)
        self.place = place

    def make(self) -> DiskTier:
        place = self.place
        return DiskTier(
            place.directory,
            place.capacity_bytes,
            evicted=place.evicted.extend,
            sealer=self.sealer,
            segment_bytes=place.segment_bytes,
            direct=place.direct,
        )

    def flip(self, tier: Any, key: bytes, offset: int) -> None:
        place = tier._pages.places[key]
        end = 4096 + place.page_bytes
        flip(place.segment.path, place.slot * place.segment.slot_bytes + offset % end)

    def cut(self, tier: Any, key: bytes, size: int) -> None:
        place = tier._pages.places[key]
        os.truncate(place.segment.path, place.slot * place.segment.slot_bytes + size)


class ObjectBed(Bed):
    def __init__(self, url: str, sealer: Sealer | None, **settings: Any) -> None:
        super().__init__(sealer)
        self.url = url
        self.settings = settings
        self.persistent = not url.startswith("memory")

    def make(self) -> ObjectTier:
        return ObjectTier(self.url, sealer=self.sealer, **self.settings)

    def flip(self, tier: Any, key: bytes, offset: int) -> None:
        record = bytearray(obstore.get(tier._store, object_name(key)).bytes())
        record[offset] ^= 0x10
        obstore.put(tier._store, object_name(key), bytes(record))

    def cut(self, tier: Any, key: bytes, size: int) -> None:
        record = bytes(obstore.get(tier._store, object_name(key)).bytes())
        obstore.put(tier._store, object_name(key), record[:size])


def serve_s3() -> Iterator[str]:
    """A server on loopback with a bucket `pool`; yields its URL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        try:
            request = urllib.request.Request(f"http://{host}:{port}/pool", method="PUT")
            with urllib.request.urlopen(request, timeout=10) as reply:
                assert reply.status == 200
            yield f"http://{host}:{port}"
        finally:
            server.stop()


def all_there(tier: StoreTier, pages: dict[bytes, bytes]) -> Sequence[bytes]:
    """Those of `pages` that are not, or not right."""
    return [key for key, data in pages.items() if get(tier, key) != data]
