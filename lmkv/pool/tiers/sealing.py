"""Encryption at rest: AES-256-GCM, one random nonce a write, bound to the object key and the page's meta.

The key comes from a file or from a setting; its id, a hash cut short, stands in each header, so a page of another key
is told from a damaged one.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
from pathlib import Path
from typing import Any

from lmkv.errors import ConfigError

from .record import Seal

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
PIECE_BYTES = 1 << 20
"""Encrypted in one call, which keeps other threads of Python from running."""


class Sealer:
    """Holds one key. Any thread."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"an encryption key has {KEY_BYTES} bytes, this one {len(key)}")
        self._cipher: Any = _cryptography("hazmat.primitives.ciphers").Cipher
        self._gcm: Any = _cryptography("hazmat.primitives.ciphers.modes").GCM
        self._algorithm: Any = _cryptography("hazmat.primitives.ciphers.algorithms").AES(key)
        self._invalid_tag: type[Exception] = _cryptography("exceptions").InvalidTag
        self.key_id = hashlib.sha256(b"lmkv key id\0" + key).digest()[:4]

    @classmethod
    def from_hex(cls, text: str) -> Sealer:
        """64 hex digits, with white space around them or not."""
        try:
            return cls(bytes.fromhex(text.strip()))
        except ValueError:
            raise ConfigError("the encryption key is not hexadecimal", hint="give 64 hex digits") from None

    @classmethod
    def from_file(cls, path: Path | str) -> Sealer:
        """32 raw bytes or 64 hex digits, in a file that only its owner and group can read."""
        path = Path(path)
        try:
            mode = path.stat().st_mode
            text = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"the key file {path} cannot be read: {error.strerror}") from error
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            raise ConfigError(
                f"the key file {path} is open to everyone (mode {stat.S_IMODE(mode):04o})", hint=f"chmod 600 {path}"
            )
        if len(text) == KEY_BYTES:
            return cls(text)
        try:
            return cls.from_hex(text.decode("ascii"))
        except (ConfigError, UnicodeDecodeError):
            raise ConfigError(
                f"the key file {path} ({len(text)} bytes) holds no key", hint="32 raw bytes or 64 hex digits"
            ) from None

    def seal(self, associated: bytes, page: memoryview, into: memoryview) -> Seal:
        """Encrypt `page` into `into` (of the same length; may be the same memory)."""
        nonce = os.urandom(NONCE_BYTES)
        encryptor = self._cipher(self._algorithm, self._gcm(nonce)).encryptor()
        encryptor.authenticate_additional_data(associated)
        _run(encryptor, page, into)
        encryptor.finalize()
        return Seal(self.key_id, nonce, encryptor.tag)

    def open(self, seal: Seal, associated: bytes, payload: memoryview, into: memoryview) -> bool:
        """Decrypt `payload` into `into` (of the same length; may be the same memory). False: it was tampered with, and
        what is in `into` must not be used."""
        decryptor = self._cipher(self._algorithm, self._gcm(seal.nonce, seal.tag)).decryptor()
        decryptor.authenticate_additional_data(associated)
        _run(decryptor, payload, into)
        try:
            decryptor.finalize()
        except self._invalid_tag:
            return False
        return True


def _run(context: Any, source: memoryview, target: memoryview) -> None:
    for at in range(0, len(source), PIECE_BYTES):
        context.update_into(source[at : at + PIECE_BYTES], target[at : at + PIECE_BYTES])


def _cryptography(module: str) -> Any:
    """Imported when a key is set: encryption is an extra."""
    try:
        return importlib.import_module(f"cryptography.{module}")
    except ImportError as error:
        raise ConfigError(f"encryption at rest needs cryptography: {error}", hint="pip install 'lmkv[pool]'") from error
