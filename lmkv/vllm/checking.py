"""Which writes carry a checksum, and whether what landed is right. The receiver decides, and says so in its card.

A write counts if its checksum, made from the source before posting, is right, or if its sender saw it complete before
its source could be overwritten. So a receiver that has every write checked takes seals that overtake writes; to any
other the seal is sent only once all writes are done (`Granted.all_checked`).

A sample is chosen by a digest that both sides compute, so a sender cannot leave out a checksum that is demanded.
"""

from __future__ import annotations

import hashlib

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.errors import LmkvError
from lmkv.ids import Epoch, Rank, TransferId
from lmkv.transport import MemoryKind

from . import memory
from .checksums import Checksums

ALL_PPM = 1_000_000
"""Every write carries a checksum; 0: none does."""


def demanded_ppm(settings: ConnectorSettings, found: memory.KvMemory) -> int:
    """How many writes of a million must carry a checksum when this rank receives."""
    policy = settings.kv_verify
    if policy == "auto":
        policy = "full" if found.kind is MemoryKind.DRAM else "sample"
    if policy == "off":
        return 0
    return ALL_PPM if policy == "full" else round(settings.kv_verify_share * ALL_PPM)


def is_checked(ppm: int, tid: TransferId, epoch: Epoch, rank: Rank, seq: int) -> bool:
    """Whether write `seq` of prefill rank `rank` is one of those that carry a checksum. Both sides agree on it."""
    if ppm >= ALL_PPM:
        return True
    if ppm <= 0:
        return False
    digest = hashlib.blake2b(f"{tid}/{epoch}/{rank}/{seq}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % ALL_PPM < ppm


class Verifier:
    """The receiver's half. `ppm` as its card says."""

    def __init__(self, ppm: int, checksums: Checksums) -> None:
        self._ppm = ppm
        self._checksums = checksums

    def demands(self, note: wire.WriteNote) -> bool:
        return is_checked(self._ppm, note.transfer_id, note.epoch, note.rank, note.seq)

    def fault(self, note: wire.WriteNote, runs: memory.Runs) -> str:
        """What is wrong with the bytes that landed in `runs`, or "". Only what is demanded is looked at."""
        if not self.demands(note):
            return ""
        if note.checksum is None:
            return "carries no checksum, which this engine demands (kv_verify)"
        try:
            return "" if self._checksums.of(runs) == note.checksum else "is corrupt"
        except LmkvError as error:
            return f"cannot be verified: {error}"
