"""Which network interface has an address: UCX is told interfaces, people know addresses."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from lmkv.errors import ConfigError

_SIOCGIFADDR = 0x8915
_INET6_TABLE = Path("/proc/net/if_inet6")


def interface_of(host: str) -> str:
    """The interface that has the address `host`, in brackets or not. Raises ConfigError where none has it."""
    try:
        wanted = ipaddress.ip_address(host.strip("[]"))
    except ValueError as error:
        raise ConfigError(f"{host!r} is not an IP address", hint="or name the devices: ?devices=eth0") from error
    found = _with_ipv6(wanted) if wanted.version == 6 else _with_ipv4(str(wanted))
    if found is None:
        raise ConfigError(f"no interface of this host has the address {host}", hint="or name it: ?devices=eth0")
    return found


def _with_ipv4(wanted: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    continue  # it has no IPv4 address, or has just gone
                raise
            if socket.inet_ntoa(answer[20:24]) == wanted:
                return name
    return None


def _with_ipv6(wanted: ipaddress.IPv6Address | ipaddress.IPv4Address) -> str | None:
    if not _INET6_TABLE.exists():
        return None
    for line in _INET6_TABLE.read_text().splitlines():
        fields = line.split()
        if int(fields[0], 16) == int(wanted):
            return fields[5]
    return None
