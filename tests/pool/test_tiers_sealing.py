"""Encryption at rest: keys from where they come, what is bound to what, and that nothing readable reaches the disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lmkv.errors import ConfigError
from lmkv.pool.tiers import sealing
from lmkv.pool.tiers.base import CorruptError, PageMeta
from lmkv.pool.tiers.disk import DiskTier
from lmkv.pool.tiers.record import associated
from lmkv.pool.tiers.sealing import PIECE_BYTES, Sealer

from .tier_bed import key_of, meta_of

KEY = bytes(range(32))


def key_file(directory: Path, content: bytes, mode: int = 0o600) -> Path:
    path = directory / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_key_from_a_file(tmp_path: Path, content: bytes, mode: int) -> None:
    assert Sealer.from_file(key_file(tmp_path, content, mode)).key_id == Sealer.from_hex(KEY.hex()).key_id


@pytest.mark.parametrize("content", [b"", KEY[:31], KEY + b"\n", b"g" * 64, KEY.hex().encode()[:62], b"\xff" * 64])
def test_a_file_without_a_key_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="holds no key") as caught:
        Sealer.from_file(key_file(tmp_path, content))
    assert str(tmp_path / "key") in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
def test_a_key_file_open_to_everyone_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"open to everyone .mode {mode:04o}.* · chmod 600"):
        Sealer.from_file(key_file(tmp_path, KEY, mode))


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Sealer.from_file(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "00" * 33])
def test_a_key_that_is_none_is_refused_and_not_told(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sealer.from_hex(text)
    assert len(text) < 3 or text not in str(caught.value)


def test_without_cryptography_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmkv\[pool\]'"):
        Sealer(KEY)


@pytest.mark.parametrize("size", [1, 4096, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5])
def test_what_was_sealed_opens(size: int) -> None:
    sealer, page = Sealer(KEY), os.urandom(size)
    sealed, opened = bytearray(size), bytearray(size)
    seal = sealer.seal(b"about", memoryview(page), memoryview(sealed))
    assert sealed != page or size < 4
    assert sealer.open(seal, b"about", memoryview(sealed), memoryview(opened))
    assert opened == page
    assert sealer.open(seal, b"about", memoryview(sealed), memoryview(sealed))
    assert sealed == page


def test_it_is_the_standard_cipher() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    page, sealed = os.urandom(2 * PIECE_BYTES + 77), bytearray(2 * PIECE_BYTES + 77)
    seal = Sealer(KEY).seal(b"about", memoryview(page), memoryview(sealed))
    assert AESGCM(KEY).decrypt(seal.nonce, bytes(sealed) + seal.tag, b"about") == page


def test_nonces_are_never_the_same() -> None:
    sealer, page = Sealer(KEY), memoryview(bytes(16))
    assert len({sealer.seal(b"", page, memoryview(bytearray(16))).nonce for _ in range(200)}) == 200


def test_another_key_page_or_meta_does_not_open() -> None:
    sealer, sealed = Sealer(KEY), bytearray(64)
    about = associated(key_of(1), PageMeta(64, (1, 2)))
    seal = sealer.seal(about, memoryview(bytes(64)), memoryview(sealed))
    others = [
        (Sealer(KEY[::-1]), about),
        (sealer, associated(key_of(2), PageMeta(64, (1, 2)))),
        (sealer, associated(key_of(1), PageMeta(64, (1, 3)))),
        (sealer, associated(key_of(1), PageMeta(65, (1, 2)))),
        (sealer, associated(key_of(1), PageMeta(64, (1,)))),
    ]
    for other, text in others:
        assert not other.open(seal, text, memoryview(sealed), memoryview(bytearray(64)))
    assert sealer.open(seal, about, memoryview(sealed), memoryview(bytearray(64)))


def test_nothing_readable_reaches_the_disk(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "tier", 0, evicted=lambda keys: None, sealer=Sealer(KEY), segment_bytes=1 << 20)
    page = b"what nobody may read " * 4000
    tier.put(key_of(1), meta_of(page), memoryview(page))
    tier.compact()
    tier.close()
    for path in (tmp_path / "tier").rglob("*"):
        assert path.is_dir() or b"nobody may read" not in path.read_bytes()
        assert path.is_dir() or KEY not in path.read_bytes()


def test_a_forged_page_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums can be made by anyone; the tag cannot: a page written with right checksums and a wrong key, under the
    key id of the right one."""
    forger = Sealer(KEY[::-1])
    forger.key_id = Sealer(KEY).key_id
    for sealer in (forger, Sealer(KEY)):
        tier = DiskTier(tmp_path / "tier", 0, evicted=lambda keys: None, sealer=sealer, segment_bytes=1 << 20)
        if sealer is forger:
            tier.put(key_of(1), PageMeta(5000, ()), memoryview(bytes(5000)))
        else:
            with pytest.raises(CorruptError):
                tier.get(key_of(1), memoryview(bytearray(5000)))
        tier.close()


def test_the_module_names_no_key() -> None:
    assert KEY.hex() not in repr(Sealer(KEY))
    assert sealing.NONCE_BYTES == 12
