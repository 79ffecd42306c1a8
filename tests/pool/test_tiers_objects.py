"""The object tier's own: names, settings, shared buckets, stores that fail, stall or lie."""

from __future__ import annotations

import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from lmkv.errors import ConfigError
from lmkv.pool.tiers.base import TierError
from lmkv.pool.tiers.objects import ObjectTier, object_key, object_name

from .tier_bed import MIB, SEALER, ObjectBed, get, key_of, put, serve_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    yield from serve_s3()


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[ObjectTier]:
    made = ObjectTier(f"file://{tmp_path}/objects")
    yield made
    made.close()


def test_names_are_keys_and_back() -> None:
    key = bytes(range(32)) + bytes([200])
    assert object_name(key) == "000102030405060708090a0b0c0d0e0f/10/101112131415161718191a1b1c1d1e1f-200"
    assert object_key(object_name(key)) == key
    for name in ("", "x", object_name(key) + "0", object_name(key)[:-3] + "256", object_name(key).upper() + "a"):
        assert object_key(name) is None


def test_the_layout_of_a_store(tmp_path: Path) -> None:
    tier = ObjectTier(f"file://{tmp_path}/with%20space")
    put(tier, key_of(1))
    tier.describe(key_of(1)[:16], '{"model": "m"}')
    root = tmp_path / "with space"
    namespace = root / key_of(1)[:16].hex()
    assert {path for path in root.rglob("*") if path.is_file()} == {
        root / object_name(key_of(1)),
        namespace / "description.json",
    }
    assert (namespace / "description.json").read_text() == '{"model": "m"}'
    assert (root / object_name(key_of(1))).stat().st_size == 4096 + 70_001
    tier.close()


def test_nodes_share_a_bucket(s3: str) -> None:
    settings = {"endpoint": s3, "region": "us-east-1", "allow_http": True}
    one, two = (ObjectTier("s3://pool/shared/prefix", **settings) for _ in range(2))  # type: ignore[arg-type]
    other = ObjectTier("s3://pool/shared/prefix-2", **settings)  # type: ignore[arg-type]
    data = put(one, key_of(1))
    put(one, key_of(2))
    assert get(two, key_of(1)) == data
    assert two.holds([key_of(1), key_of(9), key_of(2)]) == [True, False, True]
    assert other.holds([key_of(1)]) == [False]
    assert two.drop([key_of(1)]) == 1
    assert one.drop([key_of(1)]) == 0
    assert get(one, key_of(1)) is None
    assert list(other.keys()) == []
    assert list(two.keys()) == [key_of(2)]
    for each in (one, two, other):
        each.close()


def test_what_is_no_page_is_left_alone(tier: ObjectTier, tmp_path: Path) -> None:
    put(tier, key_of(1))
    stranger = tmp_path / "objects" / "notes.txt"
    stranger.write_text("not ours")
    assert list(tier.keys()) == [key_of(1)]
    assert [key for key, _ in tier.scan()] == [key_of(1)]
    assert tier.drop_namespace(b"") == 1
    assert stranger.exists()


def test_a_scan_deletes_what_is_torn(tier: ObjectTier) -> None:
    bed = ObjectBed("", None)
    for number in range(5):
        put(tier, key_of(number))
    bed.cut(tier, key_of(1), 50_000)
    bed.cut(tier, key_of(2), 10)
    bed.flip(tier, key_of(3), 50)
    assert {key for key, _ in tier.scan()} == {key_of(0), key_of(4)}
    assert tier.counters()["torn"] == 3
    assert set(tier.keys()) == {key_of(0), key_of(4)}


def test_listings_are_lazy_and_paged(tier: ObjectTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv.pool.tiers.objects.LISTED_AT_ONCE", 4)
    for number in range(30):
        put(tier, key_of(number), 100)
    asked: list[bytes] = []
    real = tier._read_header

    def counted(key: bytes, size: int) -> object:
        asked.append(key)
        return real(key, size)

    monkeypatch.setattr(tier, "_read_header", counted)
    scan = tier.scan()
    next(scan)
    assert len(asked) <= 4
    assert len(list(scan)) == 29


def test_a_namespace_is_listed_alone(tier: ObjectTier) -> None:
    for namespace in (1, 2):
        put(tier, key_of(1, namespace))
    assert list(tier.keys(bytes([2]) * 16)) == [key_of(1, 2)]
    assert list(tier.keys(bytes([3]) * 16)) == []


def test_a_put_is_checksummed_for_s3(s3: str) -> None:
    tier = ObjectTier("s3://pool/sums", endpoint=s3, region="us-east-1", allow_http=True)
    assert tier._store.config["checksum_algorithm"].lower() == "sha256"
    tier.close()


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("", {}),
        ("/tmp/here", {}),
        ("ftp://host/path", {}),
        ("file://host/path", {}),
        ("file:relative", {}),
        ("gs://bucket/x", {"endpoint": "http://127.0.0.1:1"}),
        ("gs://bucket/x", {"region": "here"}),
        ("s3://", {}),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ObjectTier(url, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_without_obstore_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmkv\[pool\]'"):
        ObjectTier("memory://")


def test_a_missing_bucket_is_a_clear_error(s3: str) -> None:
    tier = ObjectTier("s3://nowhere/x", endpoint=s3, region="us-east-1", allow_http=True, timeout_s=2)
    calls = (
        lambda: put(tier, key_of(1)),
        lambda: list(tier.keys()),
        lambda: tier.drop_namespace(b""),
        tier.descriptions,
    )
    for call in calls:
        with pytest.raises(TierError, match="nowhere") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert tier.counters()["failed"] == 1
    tier.close()


def test_plain_http_is_refused_unless_allowed(s3: str) -> None:
    tier = ObjectTier("s3://pool/x", endpoint=s3, region="us-east-1", timeout_s=2)
    with pytest.raises(TierError):
        put(tier, key_of(1))
    tier.close()


def unanswering() -> socket.socket:
    """A port that takes connections and never says a word."""
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    return server


@pytest.mark.parametrize("what", ["put", "get", "drop", "scan", "holds", "describe", "descriptions"])
def test_a_store_that_does_not_answer_costs_a_bounded_time(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with unanswering() as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        tier = ObjectTier("s3://pool/x", endpoint=endpoint, region="us-east-1", allow_http=True, timeout_s=1.0)
        calls = {
            "put": lambda: put(tier, key_of(1)),
            "get": lambda: get(tier, key_of(1)),
            "drop": lambda: tier.drop([key_of(1)]),
            "scan": lambda: list(tier.scan()),
            "holds": lambda: tier.holds([key_of(1)]),
            "describe": lambda: tier.describe(b"n" * 16, "{}"),
            "descriptions": lambda: tier.descriptions(),
        }
        started = time.monotonic()
        with pytest.raises(TierError):
            calls[what]()
        assert time.monotonic() - started < 2
        tier.close()


def test_a_store_that_is_gone_is_an_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with unanswering() as server:
        port = server.getsockname()[1]
    tier = ObjectTier("s3://pool/x", endpoint=f"http://127.0.0.1:{port}", region="r", allow_http=True, timeout_s=2)
    started = time.monotonic()
    with pytest.raises(TierError):
        get(tier, key_of(1))
    assert time.monotonic() - started < 3
    tier.close()


def test_a_store_that_fails_for_a_moment_is_asked_again(s3: str) -> None:
    """The first connection is dropped unanswered, the second goes through."""
    host, port = s3.removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as front:
        stop = threading.Thread(target=_drop_one_then_relay, args=(front, (host, int(port))))
        stop.start()
        url = f"http://127.0.0.1:{front.getsockname()[1]}"
        tier = ObjectTier("s3://pool/retry", endpoint=url, region="us-east-1", allow_http=True)
        assert tier.holds([key_of(1)]) == [False]
        tier.close()
        stop.join(10)
        assert not stop.is_alive()


def _drop_one_then_relay(front: socket.socket, back: tuple[str, int]) -> None:
    front.settimeout(10)
    front.accept()[0].close()
    with front.accept()[0] as client, socket.create_connection(back, timeout=10) as server:
        client.settimeout(10)
        server.sendall(client.recv(65536))
        client.sendall(server.recv(65536))


def test_memory_is_bounded_by_a_few_pages(tier: ObjectTier) -> None:
    size = 8 * MIB
    data = put(tier, key_of(1), size)
    into = bytearray(size)
    tracemalloc.start()
    try:
        tier.get(key_of(1), memoryview(into))
        tier.put(key_of(2), tier.get(key_of(1), memoryview(into)), memoryview(data))  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * size


def test_an_object_that_grew_is_damage_not_a_size_error(tier: ObjectTier) -> None:
    put(tier, key_of(1), 1000)
    record = bytes(obstore.get(tier._store, object_name(key_of(1))).bytes())
    obstore.put(tier._store, object_name(key_of(1)), record + bytes(5000))
    with pytest.raises(TierError) as caught:
        get(tier, key_of(1), room=1000)
    assert caught.value.code == "LMKV-P821"
    assert list(tier.keys()) == []


def test_objects_are_sealed(tmp_path: Path) -> None:
    tier = ObjectTier(f"file://{tmp_path}/objects", sealer=SEALER)
    data = b"what nobody may read " * 500
    tier.put(key_of(1), _meta(data), memoryview(data))
    stored = (tmp_path / "objects" / object_name(key_of(1))).read_bytes()
    assert b"nobody" not in stored
    into = bytearray(len(data))
    assert tier.get(key_of(1), memoryview(into)) == _meta(data)
    assert into == data
    tier.close()


def _meta(data: bytes) -> object:
    from lmkv.pool.tiers.base import PageMeta

    return PageMeta(len(data), (7,))
