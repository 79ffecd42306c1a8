"""Errors a client sees, in the OpenAI form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import msgspec
from aiohttp import web

from lmkv.errors import RouterError


class ClientError(RouterError):
    """Base of what the router itself answers. `status` and `kind` are HTTP's code and OpenAI's type."""

    status = 500
    kind = "InternalServerError"

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param

    def headers(self) -> dict[str, str]:
        return {}


class BadRequestError(ClientError):
    """The request is not one that the router or the engines take."""

    code = "LMKV-R601"
    status = 400
    kind = "BadRequestError"


class UnauthorizedError(ClientError):
    """The API key is missing or wrong."""

    code = "LMKV-R602"
    status = 401
    kind = "AuthenticationError"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFoundError(ClientError):
    """Nothing is at this path, or no request has this id."""

    code = "LMKV-R603"
    status = 404
    kind = "NotFoundError"


class NoEngineError(ClientError):
    """No decode engine is healthy."""

    code = "LMKV-R604"
    status = 503
    kind = "ServiceUnavailableError"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class UpstreamFailedError(ClientError):
    """Every attempt failed before its first token."""

    code = "LMKV-R605"
    status = 502
    kind = "BadGatewayError"


class UpstreamTimeoutError(UpstreamFailedError):
    """No attempt brought its first token in time."""

    code = "LMKV-R606"
    status = 504
    kind = "GatewayTimeoutError"


class BodyTooLargeError(ClientError):
    """The body of the request is larger than `max_body_bytes`."""

    code = "LMKV-R607"
    status = 413
    kind = "BadRequestError"


class StreamBrokenError(ClientError):
    """The decode engine went away after bytes of its answer had gone to the client."""

    code = "LMKV-R608"
    status = 502
    kind = "BadGatewayError"


class BodyTimeoutError(ClientError):
    """The client did not send the body of its request in time."""

    code = "LMKV-R609"
    status = 408
    kind = "BadRequestError"


def error_json(error: ClientError) -> bytes:
    body = {"message": str(error), "type": error.kind, "param": error.param, "code": error.status}
    return msgspec.json.encode({"error": body})


def error_response(error: ClientError, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=error.status,
        body=error_json(error),
        content_type="application/json",
        headers=error.headers() | (headers or {}),
    )


def error_event(error: ClientError) -> bytes:
    """For a stream that has begun. The blank line first ends an event that was cut off."""
    return b"\n\ndata: " + error_json(error) + b"\n\n"
