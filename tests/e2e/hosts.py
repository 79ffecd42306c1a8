"""Hosts of a test: network namespaces on a bridge, each with a boot id of its own. Needs root, `ip` and `tc`.

    root namespace (router, client) ── bridge ══ port ══ namespace of host a
                                          ╚═════ port ══ namespace of host b …

What runs on a host sees another boot id than what runs on the others, as on real machines: lmkv and UCX both take
processes of equal boot ids for neighbours. Addresses come from 198.18.0.0/15, which RFC 2544 keeps for benchmarks.
Every host knows the hardware address of every other, so that one that is cut off is a black hole, as behind a router:
nobody is told that it cannot be reached.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "lmkv-e2e-"
BRIDGE = f"{PREFIX}br"
NETWORK = "198.19.77"
ROOT_ADDRESS = f"{NETWORK}.1"
DEVICE = "kv0"
"""The one device of a host, beside `lo`."""
BURST_BYTES = 64 * 1024
QUEUE_LATENCY_MS = 50


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace. `boot_id` is the file that hides the kernel's."""

    number: int
    name: str
    boot_id: Path

    @property
    def namespace(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def port(self) -> str:
        """The bridge's end of its link."""
        return f"{PREFIX}p{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{10 + self.number}"

    @property
    def hardware(self) -> str:
        return _hardware(10 + self.number)

    def prefix(self) -> list[str]:
        """What to put before a command that is to run on this host. `ip` gives it mounts of its own, which end with
        it, and replaces itself by the command: the process id is the command's."""
        hide = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", hide, str(self.boot_id)]

    def env(self) -> dict[str, str]:
        """What vLLM and UCX have to be told about the host's network."""
        return {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "UCX_NET_DEVICES": DEVICE}

    def limit(self, mbit: float) -> None:
        """What the host sends leaves at this rate."""
        rate = ("rate", f"{mbit:g}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_LATENCY_MS}ms")
        _run("tc", "-n", self.namespace, "qdisc", "replace", "dev", DEVICE, "root", "tbf", *rate)

    def cut_off(self) -> None:
        """From now on nothing reaches the host and nothing leaves it, and nobody is told."""
        _run("ip", "link", "set", self.port, "nomaster")

    def sent_bytes(self) -> int:
        """What has come from the host over its link."""
        return self._count("rx_bytes")

    def got_bytes(self) -> int:
        """What has gone to the host over its link."""
        return self._count("tx_bytes")

    def _count(self, what: str) -> int:
        return int(Path(f"/sys/class/net/{self.port}/statistics/{what}").read_text())


def why_impossible() -> str:
    """What is missing here for making hosts; "" if nothing is."""
    if os.geteuid() != 0:
        return "hosts are network namespaces, which only root may make"
    lacking = [tool for tool in ("ip", "tc", "mount") if shutil.which(tool) is None]
    return f"hosts are network namespaces, made with {' and '.join(lacking)}: not installed" if lacking else ""


@contextlib.contextmanager
def hosts(run: Path, names: Sequence[str]) -> Iterator[list[Host]]:
    """As many hosts, which reach each other and the root namespace. `run` is a folder for their boot ids."""
    made = [Host(number, name, run / f"boot-id-{name}") for number, name in enumerate(names)]
    _remove_leftovers()
    try:
        _make_bridge()
        for host in made:
            _make(host)
        for host in made:
            _introduce(host, made)
        yield made
    finally:
        _remove_all()


def _hardware(number: int) -> str:
    return f"02:6c:6d:6b:76:{number:02x}"


def _make_bridge() -> None:
    _run("ip", "link", "add", BRIDGE, "address", _hardware(1), "type", "bridge")
    _run("ip", "addr", "add", f"{ROOT_ADDRESS}/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")


def _make(host: Host) -> None:
    host.boot_id.write_text(f"{uuid.uuid4()}\n")
    space = host.namespace
    _run("ip", "netns", "add", space)
    peer = ("peer", "name", DEVICE, "address", host.hardware, "netns", space)
    _run("ip", "link", "add", host.port, "type", "veth", *peer)
    _run("ip", "link", "set", host.port, "master", BRIDGE, "up")
    _run("ip", "-n", space, "addr", "add", f"{host.address}/24", "dev", DEVICE)
    for device in ("lo", DEVICE):
        _run("ip", "-n", space, "link", "set", device, "up")


def _introduce(host: Host, made: Sequence[Host]) -> None:
    """Tell it, and the root namespace, where the others are."""
    _run("ip", "neigh", "replace", host.address, "lladdr", host.hardware, "dev", BRIDGE, "nud", "permanent")
    others = {other.address: other.hardware for other in made if other is not host} | {ROOT_ADDRESS: _hardware(1)}
    for address, hardware in others.items():
        to = (address, "lladdr", hardware, "dev", DEVICE, "nud", "permanent")
        _run("ip", "-n", host.namespace, "neigh", "replace", *to)


def _remove_leftovers() -> None:
    """Of a run that was killed. Fails while processes live in its namespaces: it may be another one that goes on."""
    for space in _namespaces():
        pids = _run("ip", "netns", "pids", space).split()
        assert not pids, f"processes {', '.join(pids)} run in namespace {space}: end them, or wait for their test"
    _remove_all()


def _remove_all() -> None:
    """Devices first: with its port a host loses its own device, too. All is tried before what failed is raised."""
    with contextlib.ExitStack() as removing:
        for space in _namespaces():
            removing.callback(_run, "ip", "netns", "delete", space)
        for device in _devices():
            removing.callback(_run, "ip", "link", "delete", device)


def _namespaces() -> list[str]:
    names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return [name for name in names if name.startswith(PREFIX)]


def _devices() -> list[str]:
    names = [str(entry["ifname"]) for entry in json.loads(_run("ip", "-j", "link", "show"))]
    return [name for name in names if name.startswith(PREFIX)]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"`{' '.join(command)}` failed with code {done.returncode}: {done.stderr.strip()}"
    return done.stdout
