"""What back ends share: export cards, checks against registered regions, the table of operations, the owner thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Generic, TypeVar

import msgspec
import numpy as np

from lmkv.errors import ConfigError, ConnectError, ExtentError, RegistrationError, StateError, TransportError

from .base import Completion, OpId, PeerId, Region
from .extents import Bounds, Extents, MemoryKind, merge_runs, sort_rows

_ADDRESS_LIMIT = 1 << 64

T = TypeVar("T")


class RegionCard(msgspec.Struct, frozen=True, array_like=True):
    """A registered region as a peer sees it."""

    kind: MemoryKind
    address: int
    bytes: int
    device: int


class ExportCard(msgspec.Struct, frozen=True, array_like=True):
    """What `export()` says. `data` is the back end's own part (agent metadata, an address)."""

    scheme: str
    name: str
    regions: tuple[RegionCard, ...]
    data: bytes


def encode_export(scheme: str, name: str, regions: Sequence[Region], data: bytes) -> bytes:
    cards = tuple(RegionCard(r.kind, r.address, r.bytes, r.device) for r in regions)
    return msgspec.msgpack.encode(ExportCard(scheme, name, cards, data))


def decode_export(scheme: str, exported: bytes) -> ExportCard:
    """Raises ConnectError: unreadable, of another scheme, without a name, or with a region past the address space."""
    try:
        card = msgspec.msgpack.decode(exported, type=ExportCard)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConnectError(f"{len(exported)} bytes of export cannot be read: {error}") from error
    if card.scheme != scheme:
        raise ConnectError(
            f"the peer speaks {card.scheme}://, we speak {scheme}://", hint="use one transport everywhere"
        )
    if not card.name:
        raise ConnectError("the export has no name")
    for region in card.regions:
        fits = region.address >= 0 and region.bytes > 0 and region.address + region.bytes < _ADDRESS_LIMIT
        if not fits or region.device < 0:
            raise ConnectError(f"{card.name} exports an impossible region {region}")
    return card


class RegionMap:
    """Regions of one side by memory kind, ready to be checked against. Owned by the transport's thread."""

    __slots__ = ("_bounds", "_rows")

    def __init__(self, regions: Sequence[Region | RegionCard] = ()) -> None:
        self._rows: dict[MemoryKind, list[tuple[int, int, int]]] = {}
        self._bounds: dict[MemoryKind, Bounds] = {}
        for region in regions:
            self._rows.setdefault(region.kind, []).append((region.address, region.bytes, region.device))

    def add(self, region: Region) -> None:
        self._rows.setdefault(region.kind, []).append((region.address, region.bytes, region.device))
        self._bounds.pop(region.kind, None)

    def outside(self, extents: Extents) -> int | None:
        """Index of the first row outside, or None."""
        bounds = self._bounds.get(extents.kind)
        if bounds is None:
            rows = self._rows.get(extents.kind, [])
            bounds = self._bounds[extents.kind] = Bounds(np.array(rows, dtype=np.uint64).reshape(len(rows), 3))
        return bounds.outside(extents)


def check_region(region: Region, kinds: frozenset[MemoryKind]) -> None:
    """Raises RegistrationError unless `region` is a range of a known kind that can exist."""
    if region.kind not in kinds:
        raise RegistrationError(f"{region.kind} memory cannot be registered here, only {', '.join(sorted(kinds))}")
    if region.bytes <= 0 or region.address <= 0 or region.address + region.bytes >= _ADDRESS_LIMIT or region.device < 0:
        raise RegistrationError(
            f"not a region: address {region.address:#x}, {region.bytes} bytes, device {region.device}"
        )


def merge_checked(local: Extents, ours: RegionMap, remote: Extents, theirs: RegionMap) -> tuple[Extents, Extents]:
    """Merge runs and check bounds on both sides; raises ExtentError. Rows are sorted by local address first: an engine
    that hands out the blocks it was given back first has them in descending order, and those are runs, too.

    Rows that continue each other may lie in two regions that touch. The merged row then lies in neither, so the rows
    are left as they came, provided that they are inside.
    """
    merged = merge_runs(*sort_rows(local, remote))
    if ours.outside(merged[0]) is None and theirs.outside(merged[1]) is None:
        return merged
    for side, extents, regions in (("local", local, ours), ("remote", remote, theirs)):
        row = regions.outside(extents)
        if row is not None:
            address, size, device = extents.table[row].tolist()
            raise ExtentError(
                f"{side} extent {row} ({extents.kind} {address:#x}, {size} bytes, device {device}) is outside "
                "registered memory",
                hint="register it before export() and connect()",
            )
    return local, remote


def parse_options(scheme: str, netloc: str, options: Mapping[str, str], known: Sequence[str]) -> None:
    """Raises ConfigError for an address this back end has no use for, or an unknown option."""
    if netloc:
        raise ConfigError(f"{scheme}:// takes no address, got {netloc!r}", hint=f"{scheme}://?option=value")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"{scheme}:// knows no option {', '.join(unknown)}", hint=f"known: {', '.join(known)}")


def int_option(scheme: str, options: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    """An integer option within [least, most]; raises ConfigError."""
    raw = options.get(key, str(default))
    if not raw.isdecimal() or not least <= int(raw) <= most:
        raise ConfigError(f"{scheme}:// option {key}={raw!r} is not an integer from {least} to {most}")
    return int(raw)


class OwnerThread:
    """The first caller owns the object; every other thread gets StateError."""

    __slots__ = ("_ident", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._ident: int | None = None

    def check(self) -> None:
        ident = threading.get_ident()
        if self._ident is None:
            self._ident = ident
        elif self._ident != ident:
            raise StateError(
                f"{self._what} belongs to thread {self._ident}, called from {ident}",
                hint="one thread owns a transport; reach it by a queue",
            )


class OpTable(Generic[T]):
    """The life of operations: in flight → settled (Completion not handed out yet) → completed → released.

    `T` is what the back end keeps for each; `release` gives it back. Not thread-safe.
    """

    __slots__ = ("_busy", "_completed", "_ids", "_settled", "flying")

    def __init__(self) -> None:
        self._ids = count(1)
        self.flying: dict[OpId, tuple[PeerId, T]] = {}
        self._settled: list[tuple[Completion, PeerId, T]] = []
        self._completed: dict[OpId, T] = {}
        self._busy: dict[PeerId, int] = {}

    def start(self, peer: PeerId, state: T) -> OpId:
        op = OpId(next(self._ids))
        self.flying[op] = (peer, state)
        self._busy[peer] = self._busy.get(peer, 0) + 1
        return op

    def settle(self, op: OpId, error: TransportError | None) -> None:
        """`op` is terminal; its Completion comes with the next `drain`."""
        peer, state = self.flying.pop(op)
        self._settled.append((Completion(op, error), peer, state))

    def drain(self) -> list[Completion]:
        """Completions to hand out, each once; from here on they can be released."""
        out = []
        for completion, peer, state in self._settled:
            self._completed[completion.op] = state
            self._busy[peer] -= 1
            if not self._busy[peer]:
                del self._busy[peer]
            out.append(completion)
        self._settled.clear()
        return out

    def release(self, op: OpId) -> T:
        """Raises StateError unless `op` has completed and was not released."""
        if op not in self._completed:
            known = op in self.flying or any(done.op == op for done, _, _ in self._settled)
            what = "is still in flight" if known else "is unknown or was released before"
            raise StateError(f"operation {op} {what}", hint="release once, after its Completion")
        return self._completed.pop(op)

    def known(self, op: OpId) -> bool:
        return op in self.flying or op in self._completed or any(done.op == op for done, _, _ in self._settled)

    def busy(self, peer: PeerId) -> int:
        """Operations to `peer` whose Completion has not been handed out."""
        return self._busy.get(peer, 0)

    @property
    def in_flight(self) -> int:
        return len(self.flying) + len(self._settled)

    def unsettled(self) -> list[OpId]:
        """Operations whose Completion has not been handed out."""
        return [*self.flying, *(completion.op for completion, _, _ in self._settled)]

    def clear(self) -> list[T]:
        """Forget everything; gives back all states, for `close` and `abort`."""
        states = [state for _, state in self.flying.values()]
        states += [state for _, _, state in self._settled]
        states += self._completed.values()
        self.flying.clear()
        self._settled.clear()
        self._completed.clear()
        self._busy.clear()
        return states
