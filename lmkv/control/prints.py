"""Fingerprints: 8 bytes that stand for an object key of 33 in a view, and records as columns.

Two keys with one fingerprint (one pair in 2⁶⁴) make the view list a page that is not there: a miss at the node.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lmkv.errors import WireError
from lmkv.poolwire import EVENT_BYTES, NAMESPACE_BYTES, PAGE_KEY_BYTES

Prints = npt.NDArray[np.uint64]
Masks = npt.NDArray[np.uint8]

_RECORD = np.dtype([("n0", "<u8"), ("n1", "<u8"), ("c0", "<u8"), ("c1", "<u8"), ("group", "u1"), ("tiers", "u1")])
_PAGE_KEY = np.dtype([("c0", "<u8"), ("c1", "<u8"), ("group", "u1")])
_ODD = tuple(np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93))
_SHIFT = np.uint64(32)
_ONE = np.uint64(1)

if _RECORD.itemsize != EVENT_BYTES or _PAGE_KEY.itemsize != PAGE_KEY_BYTES:
    raise AssertionError("lmkv.poolwire has other keys than this file")


@lru_cache(maxsize=4096)
def _seed(namespace: bytes) -> np.uint64:
    return np.uint64(_fold(np.frombuffer(namespace, "<u8", 1), np.frombuffer(namespace, "<u8", 1, 8))[0])


def _fold(first: Prints, second: Prints) -> Prints:
    """Sums lose the highest bits of one word into those of another; a shift in between keeps them apart."""
    mixed = first * _ODD[2]
    mixed ^= mixed >> np.uint64(31)
    mixed += second * _ODD[3]
    mixed ^= mixed >> np.uint64(33)
    return mixed


def _mix(seed: Prints | np.uint64, columns: npt.NDArray[np.void]) -> Prints:
    """Every bit of the input reaches the low and the high half; 0 is kept free to mean an empty slot."""
    mixed: Prints = columns["c1"] * _ODD[0]
    mixed += seed
    mixed ^= mixed >> _SHIFT
    mixed += columns["c0"]
    mixed += columns["group"] * _ODD[1]
    mixed ^= mixed >> _SHIFT
    mixed *= _ODD[3]
    mixed ^= mixed >> _SHIFT
    mixed *= _ODD[0]
    mixed ^= mixed >> _SHIFT
    return np.maximum(mixed, _ONE, out=mixed)


def of_keys(namespace: bytes, keys: bytes) -> Prints:
    """Of page keys of one namespace. Raises WireError for bytes that are no keys."""
    if len(namespace) != NAMESPACE_BYTES or len(keys) % PAGE_KEY_BYTES:
        raise WireError(
            f"a namespace of {len(namespace)} bytes and keys of {len(keys)} bytes: expected {NAMESPACE_BYTES} and a"
            f" multiple of {PAGE_KEY_BYTES}"
        )
    return _mix(_seed(namespace), np.frombuffer(keys, _PAGE_KEY))


def of_records(records: bytes) -> tuple[Prints, Masks]:
    """Of records as in `lmkv.poolwire.SnapshotPart`, with their tiers. Raises WireError."""
    if len(records) % EVENT_BYTES:
        raise WireError(f"{len(records)} bytes are no whole number of records of {EVENT_BYTES} bytes")
    columns = np.frombuffer(records, _RECORD)
    return _mix(_fold(columns["n0"], columns["n1"]), columns), columns["tiers"] & np.uint8(7)
