"""Two hosts on one machine: network namespaces joined by a veth whose rate is limited.

    root namespace ── unlimited veth ── lmkv-bench-p ══ limited veth ══ lmkv-bench-d ── unlimited veth ── root namespace

HTTP goes over the unlimited pairs, KV and the engines' control messages over the limited one. Addresses come from
198.18.0.0/15, which RFC 2544 keeps for benchmarks. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from dataclasses import dataclass

from bench.errors import BenchError, progress

PREFIX = "lmkv-bench-"
BURST_BYTES = 64 * 1024
QUEUE_LATENCY_MS = 50


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace: its limited device, and the addresses at which the peer and the client reach it."""

    namespace: str
    link_device: str
    link_address: str
    http_device: str
    http_peer_device: str
    http_address: str
    http_peer_address: str


PREFILL_HOST = Host(f"{PREFIX}p", f"{PREFIX}l0", "198.18.0.1", f"{PREFIX}h0", f"{PREFIX}r0", "198.18.1.2", "198.18.1.1")
DECODE_HOST = Host(f"{PREFIX}d", f"{PREFIX}l1", "198.18.0.2", f"{PREFIX}h1", f"{PREFIX}r1", "198.18.2.2", "198.18.2.1")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"`{' '.join(command)}` failed with code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Link:
    """The namespaces and devices; `close` removes them and may be called twice. `rate_mbit` 0: as fast as it goes."""

    def __init__(self, rate_mbit: float) -> None:
        if os.geteuid() != 0:
            raise BenchError("--link-mbit makes network namespaces, which only root may do; run it as root")
        self.rate_mbit = rate_mbit
        remove_leftovers()
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    def _create(self) -> None:
        for host in (PREFILL_HOST, DECODE_HOST):
            _run("ip", "netns", "add", host.namespace)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        _run("ip", "link", "add", PREFILL_HOST.link_device, "type", "veth", "peer", "name", DECODE_HOST.link_device)
        for host in (PREFILL_HOST, DECODE_HOST):
            _run("ip", "link", "add", host.http_peer_device, "type", "veth", "peer", "name", host.http_device)
            _run("ip", "addr", "add", f"{host.http_peer_address}/30", "dev", host.http_peer_device)
            _run("ip", "link", "set", host.http_peer_device, "up")
            for device, address in ((host.http_device, host.http_address), (host.link_device, host.link_address)):
                _run("ip", "link", "set", device, "netns", host.namespace)
                _run("ip", "-n", host.namespace, "addr", "add", f"{address}/30", "dev", device)
                _run("ip", "-n", host.namespace, "link", "set", device, "up")
            self._limit(host)

    def _limit(self, host: Host) -> None:
        if not self.rate_mbit:
            return
        limit = ["rate", f"{self.rate_mbit:.3f}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_LATENCY_MS}ms"]
        _run("tc", "-n", host.namespace, "qdisc", "add", "dev", host.link_device, "root", "tbf", *limit)

    def sent_bytes(self, host: Host) -> int:
        """Bytes that left this host over the limited device since it was made."""
        shown = json.loads(_run("tc", "-n", host.namespace, "-s", "-j", "qdisc", "show", "dev", host.link_device))
        return int(shown[0]["bytes"])

    def close(self) -> None:
        for host in (PREFILL_HOST, DECODE_HOST):
            with contextlib.suppress(BenchError):
                _run("ip", "netns", "delete", host.namespace)
        _remove_devices()


def remove_leftovers() -> None:
    """Removes what an earlier benchmark left behind; refuses while processes still live in its namespaces."""
    for name in _namespaces():
        pids = _run("ip", "netns", "pids", name).split()
        if pids:
            raise BenchError(f"processes {', '.join(pids)} run in namespace {name}: is another benchmark running?")
        progress(f"removing namespace {name} of an earlier benchmark")
        _run("ip", "netns", "delete", name)
    _remove_devices()


def _namespaces() -> list[str]:
    names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return [name for name in names if name.startswith(PREFIX)]


def _remove_devices() -> None:
    for entry in json.loads(_run("ip", "-j", "link", "show") or "[]"):
        if str(entry["ifname"]).startswith(PREFIX):
            with contextlib.suppress(BenchError):  # removing one end of a pair removes the other
                _run("ip", "link", "delete", str(entry["ifname"]))
