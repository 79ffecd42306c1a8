"""Scheme → back end. A back end is imported when it is first asked for, never before."""

from __future__ import annotations

from importlib import import_module
from urllib.parse import parse_qsl, urlsplit

from lmkv.errors import SchemeError

from .base import Transport

_BACK_ENDS = {
    "nixl": ("lmkv.transport.nixl", "NixlTransport", "pip install 'lmkv[nixl]'"),
    "tcp": ("lmkv.transport.tcp", "TcpTransport", ""),
    "ucx": ("lmkv.transport.ucx", "UcxTransport", "pip install 'lmkv[ucx]'"),
    "inproc": ("lmkv.transport.inproc", "InprocTransport", ""),
}


def schemes() -> list[str]:
    """All known schemes, whether or not their libraries are installed."""
    return sorted(_BACK_ENDS)


def open_transport(url: str, name: str) -> Transport:
    """`scheme://[host[:port]]?option=value`. Raises SchemeError: unknown scheme, or its library is missing."""
    parts = urlsplit(url)
    if parts.scheme not in _BACK_ENDS:
        raise SchemeError(f"unknown transport {url!r}", hint=f"known: {', '.join(f'{s}://' for s in schemes())}")
    module, attribute, install = _BACK_ENDS[parts.scheme]
    try:
        back_end = getattr(import_module(module), attribute)
    except ImportError as error:
        raise SchemeError(f"{parts.scheme}:// cannot be loaded: {error}", hint=install) from error
    transport: Transport = back_end(name, netloc=parts.netloc, options=dict(parse_qsl(parts.query)))
    return transport
