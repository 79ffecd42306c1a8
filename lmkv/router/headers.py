"""Which headers pass the router. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from multidict import CIMultiDict, CIMultiDictProxy
from pydantic import SecretStr

from .replies import UnauthorizedError

REQUEST_ID = "X-Request-Id"
TRANSFER_ID = "X-Lmkv-Transfer-Id"

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"}
    | {"te", "trailer", "transfer-encoding", "upgrade"}  # codespell:ignore te
)
_NOT_UP = _HOP_BY_HOP | {"host", "content-length", "content-encoding", "expect", "accept-encoding", "x-request-id"} | {
    "x-data-parallel-rank"  # names a rank of one engine; the request goes to two
}  # fmt: skip
_NOT_DOWN = _HOP_BY_HOP | {"content-length", "date", "server", "x-request-id"}


def upstream_headers(
    client: CIMultiDictProxy[str], request_id: str, api_key: SecretStr | None, engine_api_key: SecretStr | None
) -> CIMultiDict[str]:
    """The client's headers for the engines. With a router key the client's key is the router's and stays here."""
    headers = _without(client, _NOT_UP)
    headers[REQUEST_ID] = request_id
    # Bytes are forwarded as they come and the first events are read: no compression on the way.
    headers["Accept-Encoding"] = "identity"
    if api_key is not None:
        headers.popall("Authorization", None)
    if engine_api_key is not None:
        headers["Authorization"] = f"Bearer {engine_api_key.get_secret_value()}"
    return headers


def downstream_headers(engine: CIMultiDictProxy[str], own: dict[str, str]) -> CIMultiDict[str]:
    headers = _without(engine, _NOT_DOWN)
    headers.update(own)
    return headers


def check_key(client: CIMultiDictProxy[str], api_key: SecretStr | None) -> None:
    """Raises UnauthorizedError."""
    if api_key is None:
        return
    scheme, _, token = client.get("Authorization", "").partition(" ")
    expected = api_key.get_secret_value().encode()
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(errors="surrogateescape"), expected):
        raise UnauthorizedError("the API key is missing or wrong", hint="send Authorization: Bearer KEY")


def _without(headers: CIMultiDictProxy[str], names: Iterable[str]) -> CIMultiDict[str]:
    """Also without what `Connection` declares to be of one hop."""
    named = {name.strip().lower() for value in headers.getall("Connection", ()) for name in value.split(",")}
    drop = {*names, *named}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in drop)
