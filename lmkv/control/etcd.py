"""Membership in etcd, over the JSON gateway of its v3 API (no client library): each node's card under
prefix/incarnation, bound to a lease that its node keeps alive.

A node calls `register`, then `withdraw`; a controller calls `watch` and reads `cards()`. Both run a thread of their own
that goes on through outages: a registration is renewed as soon as etcd is back, and until then `cards()` is what was
known last. Every call has a deadline.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from lmkv.errors import ConfigError, PoolError
from lmkv.poolwire import NodeCard

logger = logging.getLogger(__name__)

CALL_S = 2.0
REFRESH_S = 5.0
"""A watch that is silent for so long is opened anew, with a fresh list: its connection may be dead."""
_RETRY_MOST_S = 2.0
_ANSWER_BYTES = 64 << 20


class EtcdError(PoolError):
    """etcd cannot be reached, or does not do what was asked."""

    code = "LMKV-P841"


class _Header(msgspec.Struct):
    revision: int


class _Pair(msgspec.Struct):
    key: str = ""
    value: str = ""


class _Range(msgspec.Struct):
    header: _Header
    kvs: list[_Pair] = []


class _Granted(msgspec.Struct):
    ID: str


class _Kept(msgspec.Struct):
    TTL: int = 0


class _Alive(msgspec.Struct):
    result: _Kept


class _Any(msgspec.Struct):
    """An answer in which nothing is looked for."""


_T = TypeVar("_T", bound=msgspec.Struct)


class EtcdMembership:
    """`urls`: one or several (separated by commas) of the members of one cluster. Methods may be called by any thread.

    Raises ConfigError for an address that is none. `close()` ends the threads; it withdraws nothing (the lease runs
    out)."""

    def __init__(self, urls: str, prefix: str, ttl_s: int = 10) -> None:
        self._urls = [_checked(url.strip()) for url in urls.split(",")]
        self._at = 0
        if not prefix.startswith("/") or ttl_s < 2:
            raise ConfigError(
                f"etcd: prefix {prefix!r}, lease of {ttl_s} s",
                hint="begin the prefix with /, use 2 s or more",
            )
        self._prefix = prefix.rstrip("/") + "/"
        self._ttl_s = ttl_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._cards: list[NodeCard] = []
        self._threads: list[threading.Thread] = []
        self._stream: socket.socket | None = None
        self._card: NodeCard | None = None
        self._lease = ""
        self.connected = False
        """The last call was answered."""

    # --- for controllers ---

    def watch(self) -> None:
        """Keep `cards()` up to date from now on."""
        self._start(self._watch, "etcd watch")

    def cards(self) -> list[NodeCard]:
        with self._lock:
            return list(self._cards)

    # --- for nodes ---

    def register(self, card: NodeCard) -> None:
        """From now until `withdraw` the card is there, whenever etcd can be reached."""
        self._card = card
        self._start(self._keep_alive, "etcd lease")

    @property
    def registered(self) -> bool:
        return bool(self._lease)

    def withdraw(self) -> None:
        """Off the list at once; if etcd is away, when the lease runs out. Ends the threads."""
        self.close()
        if self._lease:
            try:
                self._call("lease/revoke", {"ID": self._lease}, _Any)
            except EtcdError as error:
                logger.warning("not withdrawn, the lease will run out: %s", error)
            self._lease = ""

    def close(self) -> None:
        """Idempotent."""
        self._stop.set()
        stream = self._stream
        if stream is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                stream.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(CALL_S + REFRESH_S)
        self._threads.clear()

    # --- threads ---

    def _start(self, loop: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=self._run, args=(loop,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, turn: Callable[[], None]) -> None:
        """Turn after turn. After an error the next member of the cluster is asked, with growing pauses."""
        pause_s = 0.1
        while not self._stop.is_set():
            try:
                turn()
                self.connected, pause_s = True, 0.1
            except EtcdError as error:
                if self._stop.is_set():
                    return
                (logger.warning if self.connected or pause_s == 0.1 else logger.debug)("%s", error)
                self.connected = False
                self._at += 1
                self._stop.wait(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MOST_S)

    def _keep_alive(self) -> None:
        if self._lease:
            if self._call("lease/keepalive", {"ID": self._lease}, _Alive).result.TTL > 0:
                self._stop.wait(self._ttl_s / 3)
                return
            logger.warning("the lease in etcd has run out; registering again")
            self._lease = ""
        assert self._card is not None
        lease = self._call("lease/grant", {"TTL": self._ttl_s}, _Granted).ID
        key = self._prefix + self._card.incarnation
        value = msgspec.json.encode(self._card)
        self._call("kv/put", {"key": _b64(key.encode()), "value": _b64(value), "lease": lease}, _Any)
        self._lease = lease
        self._stop.wait(self._ttl_s / 3)

    def _watch(self) -> None:
        """One list, then wait until something changes (or might have)."""
        span = {"key": _b64(self._prefix.encode()), "range_end": _b64((self._prefix[:-1] + "0").encode())}
        answer = self._call("kv/range", span, _Range)
        cards = [card for pair in answer.kvs if (card := _card(pair)) is not None]
        with self._lock:
            self._cards = cards
        self.connected = True
        self._until_change({"create_request": span | {"start_revision": str(answer.header.revision + 1)}})

    def _until_change(self, body: dict[str, Any]) -> None:
        connection, answer = self._post("watch", body, REFRESH_S)
        try:
            self._stream = connection.sock
            while not self._stop.is_set():
                line = answer.readline(_ANSWER_BYTES)
                if not line:
                    raise EtcdError(f"etcd at {self._url} ended a watch")
                if b'"events"' in line:
                    return
        except TimeoutError:
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise EtcdError(f"a watch at etcd {self._url} broke: {error}") from error
        finally:
            self._stream = None
            connection.close()

    # --- calls ---

    @property
    def _url(self) -> str:
        return self._urls[self._at % len(self._urls)]

    def _call(self, path: str, body: dict[str, Any], kind: type[_T]) -> _T:
        """The gateway writes 64-bit numbers as strings."""
        connection, answer = self._post(path, body, CALL_S)
        try:
            return msgspec.json.decode(answer.read(_ANSWER_BYTES), type=kind, strict=False)
        except (OSError, msgspec.DecodeError, http.client.HTTPException) as error:
            raise EtcdError(
                f"the answer of etcd at {self._url} to {path} cannot be read: {error}",
                hint="check that the v3 API of an etcd is served at this URL",
            ) from error
        finally:
            connection.close()

    def _post(
        self, path: str, body: dict[str, Any], timeout_s: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        url = urlsplit(self._url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port or 2379, timeout=timeout_s)
        try:
            connection.request("POST", f"/v3/{path}", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                said = answer.read(500).decode(errors="replace").strip()
                raise EtcdError(f"etcd at {self._url} answered {path} with {answer.status}: {said}")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EtcdError(
                f"etcd at {self._url} does not answer {path}: {error}", hint="check the URL and that etcd runs there"
            ) from error
        except EtcdError:
            connection.close()
            raise
        return connection, answer


def _checked(url: str) -> str:
    parts = urlsplit(url)
    try:
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(f"{url!r} is not the address of an etcd", hint="write it as http://HOST:2379")
    return url


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _card(pair: _Pair) -> NodeCard | None:
    """What somebody else wrote under our prefix is left alone."""
    try:
        return msgspec.json.decode(base64.b64decode(pair.value), type=NodeCard)
    except (msgspec.DecodeError, ValueError) as error:
        logger.warning("a value under etcd's key %s is no node's card: %s", pair.key, error)
        return None
