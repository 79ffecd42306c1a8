"""What LoRA adapters contain, as part of the names of KV.

An adapter is told by the digest of its files, if they are older than this process: then what the engine has loaded is
what lies there. One whose files are newer, or that was replaced in place, may have been loaded in another state than
the files show now; its KV is right for this engine, and is shared with no other.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from lmkv.control.runtime import THREADS, Runtime
from lmkv.errors import ConfigError
from lmkv.weights import (
    Located,
    default_cache,
    identity,
    locate,
    newest_s,
    process_start_s,
    weight_files,
    weights_digest,
)

logger = logging.getLogger(__name__)

_MOST = 1024
"""Adapters that are remembered; the one that was not asked for the longest is read again."""

_Key = tuple[int, str, bool]
_Files = tuple[str, ...]


class Adapters:
    """`content` from the engine thread; files are read in the background.

    `settings`: what of vLLM's LoRA settings decides how an adapter's files are used (lmkv.vllm.contents).
    """

    def __init__(self, settings: str = "", runtime: Runtime = THREADS) -> None:
        self._settings = settings.encode()
        self._runtime = runtime
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, tuple[_Files, bytes | None]] = OrderedDict()
        self._reading: set[_Key] = set()
        self._own = runtime.entropy(8)
        self.since_reset = b""
        """What the name of all KV of this engine has in it since its prefix cache was reset."""

    def content(self, lora: Any) -> bytes | None:
        """32 bytes that stand for the adapter of `lora` (vLLM's LoRARequest) as it is now.

        None: not known yet, it is being read; or it cannot be known, which is logged once. The files are looked at each
        time, because vLLM can load an adapter again under the same id and path.
        """
        key = (lora.lora_int_id, lora.lora_path, lora.is_3d_lora_weight)
        try:
            located = locate(lora.lora_path, None, os.environ)
            files = _identities(located) if located is not None else ()
        except OSError:
            located, files = None, ()
        with self._lock:
            seen, content = self._known.get(key, (None, None))
            if seen == files:
                self._known.move_to_end(key)
                return content
            if located is None:
                self._keep(key, files, None)
                logger.error("adapter %r has no name: %r is not on this host", lora.lora_name, lora.lora_path)
                return None
            if key in self._reading:
                return None
            self._reading.add(key)
        self._runtime.background("lmkv-adapter", lambda: self._read(key, located, files, lora.lora_name))
        return None

    def forget(self, since_reset: str) -> None:
        """The prefix cache was reset: weights and adapters may be others. `since_reset` tells KV from that before."""
        with self._lock:
            self._known.clear()
            self._own = self._runtime.entropy(8)
            self.since_reset = since_reset.encode()

    def _read(self, key: _Key, located: Located, files: _Files, name: str) -> None:
        content: bytes | None = None
        try:
            content = self._digest(key, located, files, name)
        except (ConfigError, OSError) as error:
            logger.error("adapter %r has no name: %s", name, error)
        with self._lock:
            self._keep(key, files, content)
            self._reading.discard(key)

    def _digest(self, key: _Key, located: Located, files: _Files, name: str) -> bytes | None:
        digest = weights_digest(located.path, default_cache(os.environ))
        if not digest:
            logger.error("adapter %r has no name: %s has no weight files", name, located.path)
            return None
        state = hashlib.blake2b(f"{digest}:{key[2]}:".encode() + self._settings, digest_size=32)
        config = located.path / "adapter_config.json"
        if config.exists():
            state.update(b":" + config.read_bytes())
        pointers = [located.pointer] if located.pointer is not None else []
        if newest_s([*_files(located), *pointers]) >= process_start_s() or _identities(located) != files:
            logger.info("adapter %r is newer than this engine; its KV is shared with no other engine", name)
            state.update(b":" + self._own + key[0].to_bytes(8, "little") + "".join(files).encode())
        return state.digest()

    def _keep(self, key: _Key, files: _Files, content: bytes | None) -> None:
        self._known[key] = (files, content)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)


def _files(located: Located) -> list[Path]:
    """All that vLLM reads of an adapter."""
    config = located.path / "adapter_config.json"
    return [*weight_files(located.path), *([config] if config.exists() else [])]


def _identities(located: Located) -> _Files:
    """What differs once a file of the adapter has been changed, replaced, added or taken away. Raises OSError."""
    return tuple(f"{file.name}:{identity(file)}" for file in _files(located))
