"""What LoRA adapters contain, as part of the names of KV.

An adapter is told by the digest of its files, if they are older than this process: then what the engine has loaded is
what lies there. One whose files are newer, or that was replaced in place, may have been loaded in another state than
the files show now; its KV is right for this engine, and is shared with no other.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

from lmkv.control.runtime import THREADS, Runtime
from lmkv.errors import ConfigError
from lmkv.weights import default_cache, newest_s, process_start_s, weights_digest

logger = logging.getLogger(__name__)


class Adapters:
    """`content` from the engine thread; files are read in the background."""

    def __init__(self, runtime: Runtime = THREADS) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._known: dict[tuple[int, str], bytes] = {}
        self._reading: set[tuple[int, str]] = set()
        self._own = self._runtime.entropy(8)

    def content(self, lora: Any) -> bytes | None:
        """None: not known yet; it is being read."""
        key = (lora.lora_int_id, lora.lora_path)
        with self._lock:
            known = self._known.get(key)
            if known is not None or key in self._reading:
                return known
            self._reading.add(key)
        self._runtime.background("lmkv-adapter", lambda: self._read(key, lora.lora_name))
        return None

    def forget(self) -> None:
        """Adapters may have been replaced."""
        with self._lock:
            self._known.clear()
            self._own = self._runtime.entropy(8)

    def _read(self, key: tuple[int, str], name: str) -> None:
        number, path = key
        try:
            digest = weights_digest(path, default_cache(os.environ))
            settings = Path(path, "adapter_config.json")
            config = settings.read_bytes() if settings.exists() else b""
            shared = Path(path).exists() and newest_s(Path(path)) < process_start_s()
        except (ConfigError, OSError) as error:
            logger.error("adapter %r is not pooled: %s", name, error)
            return
        content = digest.encode() + b":" + config
        if not shared:
            logger.info("adapter %r is newer than this engine; its KV is shared with no other engine", name)
            content += b":" + self._own + number.to_bytes(8, "little")
        with self._lock:
            self._known[key] = content
            self._reading.discard(key)
