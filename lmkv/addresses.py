"""Control addresses: one grammar for settings, the command line and messages.

The grammar is narrower than what ZeroMQ takes, so an address that passes here is never refused by `zmq_connect`. An
address that is wrong must be found here: ZeroMQ refuses some (`x`, `tcp://tcp://10.0.0.5:1`) by raising in whatever
loop connects, and takes others (`tcp://[::1:5`, `tcp://h:99999`) without ever reaching anybody.

Pure: names are not looked up.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

import msgspec

from .errors import ConfigError

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62})){0,30}\.?"
_V6 = r"\[[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,15})?\]"
_PORT = r"(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
PATTERN = rf"\Atcp://(?:{_NAME}|{_V6}):{_PORT}\Z"
"""What messages may carry: a host that can be connected to, and a port from 1 to 65535."""

MOST_CHARACTERS = 255
Address = Annotated[str, msgspec.Meta(pattern=PATTERN, max_length=MOST_CHARACTERS)]
"""A control address in a message: one that does not match makes the message unreadable (WireError)."""
NoAddress = Annotated[str, msgspec.Meta(pattern=rf"{PATTERN}|\A\Z", max_length=MOST_CHARACTERS)]
"""An Address, or "" for none."""

WILDCARDS = ("*", "0.0.0.0", "::")
"""Hosts that listen on every interface, and that nobody can connect to."""

_ADDRESS = re.compile(r"\Atcp://(?P<host>\[[^\[\]]*\]|[^:\[\]/]*):(?P<port>[0-9]{1,5})\Z", re.ASCII)
_HOST = re.compile(rf"\A{_NAME}\Z", re.ASCII)
_ZONE = re.compile(r"\A[A-Za-z0-9_.-]{1,15}\Z", re.ASCII)


def split_address(address: str, *, listen: bool = False) -> tuple[str, int]:
    """`tcp://HOST:PORT` as (host, port), the host without brackets.

    `listen`: the address is one to bind, so its port may be 0 (any free one) and its host a wildcard or the name of an
    interface. Raises ConfigError that says what is wrong.
    """
    hint = "write it as tcp://HOST:PORT"
    match = _ADDRESS.match(address) if isinstance(address, str) and len(address) <= MOST_CHARACTERS else None
    if match is None:
        raise ConfigError(f"{_short(address)} is not a control address", hint=hint)
    host, port = match["host"], int(match["port"])
    if port > 65535 or (port == 0 and not listen):
        raise ConfigError(f"{address!r} has the port {port}", hint=f"{hint}, with a port from 1 to 65535")
    if listen and host == "*":
        return host, port
    if host.startswith("["):
        host = host[1:-1]
        wrong = "" if _is_v6(host) else "is not an IPv6 address"
    else:
        wrong = _wrong_name(host)
    if wrong:
        raise ConfigError(f"{address!r}: the host {host!r} {wrong}", hint=hint)
    return host, port


def check_host(host: str, setting: str = "advertise") -> str:
    """A bare host that peers can connect to: a name, an IPv4 address, or an IPv6 address (brackets are taken off).

    Raises ConfigError, with a hint where an address was written in a host's place.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if "://" in host:
        raise ConfigError(
            f"{setting} is {host!r}, which is an address",
            hint=f"give the host alone, without scheme and port: {setting} {_host_of(host)}",
        )
    if bare in WILDCARDS:
        raise ConfigError(f"{setting} is {host!r}, to which nobody can connect", hint="give the host that peers reach")
    if _is_v6(bare) or not _wrong_name(host):
        return bare
    raise ConfigError(f"{setting} is {host!r}, which is not a host", hint="give a host name or an IP address alone")


def checked(setting: str, address: str, *, listen: bool = False) -> str:
    """The address, if it is one (see `split_address`). Raises ConfigError that names the setting."""
    try:
        split_address(address, listen=listen)
    except ConfigError as error:
        raise ConfigError(f"setting {setting!r}: {error.message}", hint=error.hint) from None
    return address


def check_reachable(listen: str, advertise: str) -> None:
    """Raise ConfigError for a listen address that says nothing about where peers connect to, and no `advertise`."""
    host, _ = split_address(listen, listen=True)
    if host in WILDCARDS and not advertise:
        raise ConfigError(
            f"listen is {listen!r}, which is every interface: nobody can be told where to connect to",
            hint="set advertise to the host name or IP address that others reach, or listen on that",
        )


def explain(error: Exception) -> str:
    """What msgspec says of a message, without the pattern of an Address in it."""
    text = str(error)
    at = text.find(" - at `")
    return f"expected tcp://HOST:PORT{text[at:] if at >= 0 else ''}" if r"\Atcp://" in text else text


def join_address(host: str, port: int | str) -> str:
    """`tcp://HOST:PORT`; an IPv6 host gets its brackets. A port may be `*`."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def problem(address: str) -> str:
    """What is wrong with an address to connect to; "" for nothing."""
    try:
        split_address(address)
    except ConfigError as error:
        return error.message
    return ""


def _wrong_name(host: str) -> str:
    if not _HOST.match(host):
        return "is not a host name"
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            return "is not an IPv4 address"
    return ""


def _is_v6(host: str) -> bool:
    bare, percent, zone = host.partition("%")
    try:
        ipaddress.IPv6Address(bare)
    except ValueError:
        return False
    return not percent or bool(_ZONE.match(zone))


def _host_of(address: str) -> str:
    rest = address.partition("://")[2]
    return rest[: rest.find("]") + 1] if rest.startswith("[") else rest.partition(":")[0].partition("/")[0] or "HOST"


def _short(address: object) -> str:
    text = repr(address)
    return text if len(text) <= 100 else f"{text[:100]}…"
