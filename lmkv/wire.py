"""Every message that crosses a process border, as msgspec Structs; no pickle anywhere.

Two planes carry them: the **control plane** (ZeroMQ, `Control`) and **notes** on the data plane (`Note`), which
arrive with or after the bytes they speak of. `encode`/`decode_*` are the only way in and out; whatever cannot be read
raises WireError and is dropped by the shell with a counter.

Growth: new fields get defaults and go last; a field is never reused; what old peers cannot read raises PROTOCOL.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from .addresses import Address, explain
from .errors import WireError
from .ids import (
    EngineName,
    Epoch,
    Incarnation,
    Index,
    Pointer,
    Rank,
    Size,
    SlotIndex,
    Total,
    TransferId,
    Unsigned,
)
from .layout import Geometry

PROTOCOL = 3


class _Message(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Array-encoded, tagged by class name."""


# --- what engines tell each other about themselves ---


class LayerCard(_Message, frozen=True):
    """Where one layer's blocks lie in a worker: block b is `block_bytes` at `address + b * block_stride_bytes`."""

    address: Pointer
    block_bytes: Size
    block_stride_bytes: Size
    num_blocks: Index
    group: Index
    """Index of the KV cache group the layer belongs to (an index into Grant.block_ids)."""
    device: Index = 0


class ProcessCard(_Message, frozen=True):
    """A process (lmkv.process): boot of its host, namespace of process ids, and start in clock ticks since boot."""

    host: str = ""
    namespace: str = ""
    pid: int = 0
    started: int = 0


class Times(_Message, frozen=True):
    """An engine's deadlines, s: interval of heartbeats, leases, prefill's hold, decode's wait for a transfer."""

    beat_s: float = 0.5
    lease_s: float = 10.0
    hold_s: float = 120.0
    deadline_s: float = 120.0


class WorkerCard(_Message, frozen=True):
    """One worker rank: its control address, its data plane export, its layers in model order."""

    rank: Rank
    address: Address
    scheme: str
    export: bytes
    kind: str
    """Memory kind of the KV cache: "DRAM" or "VRAM"."""
    layers: tuple[LayerCard, ...]
    scratch_address: Pointer
    scratch_bytes: Size
    """A few registered bytes nobody reads, for warming a pair."""
    geometries: tuple[Geometry, ...] = ()
    """How the layers lie, by group; none: the interior is not one that lmkv can convert (direct mode only)."""
    slots_address: Pointer = 0
    slots: Index = 0
    slot_bytes: Size = 0
    """Landing mode: slot i is `slot_bytes` at `slots_address + i * slot_bytes`, of the same memory kind."""
    checked_ppm: int = 1_000_000
    """As a receiver: so many writes of a million must carry a checksum (lmkv.vllm.checking)."""
    checksum: str = "xxh3-64"
    """The function that this rank can compute over its caches; "": none."""
    process: ProcessCard = ProcessCard()
    """The default names none: its end cannot be proved."""
    scratch_kind: str = "DRAM"
    """Memory kind of the scratch: that of the KV cache, so that warming opens what writes of KV will use."""
    scratch_device: int = 0


class EngineCard(_Message, frozen=True):
    """One engine. `must` fields have to be equal for any exchange; `layout` fields for direct mode."""

    name: EngineName
    incarnation: Incarnation
    address: Address
    role: str
    """"prefill", "decode" or "both"."""
    must: dict[str, str]
    layout: dict[str, str]
    block_tokens: tuple[Index, ...]
    """Tokens a block, by KV cache group."""
    workers: tuple[WorkerCard, ...]
    protocol: int = PROTOCOL
    convert_dtype: bool = False
    """Decode takes KV of another dtype and converts it, which changes the numbers."""
    times: Times = Times()


# --- control plane: pairing ---


class Meet(_Message, frozen=True, tag=True):
    """To an engine: pair with the engine at `address`. Answered by Met when it is done or refused, which it is for an
    `address` that is none."""

    address: str
    token: str


class Met(_Message, frozen=True, tag=True):
    """`name`/`incarnation` are the peer's; `refused` is empty when the pair is ready."""

    token: str
    name: str
    incarnation: str
    refused: str = ""


class Hello(_Message, frozen=True, tag=True):
    """`pair` numbers the sender's side of the pair, and its grants: another one means that it makes the pair anew."""

    card: EngineCard
    pair: int = 0


class Welcome(_Message, frozen=True, tag=True):
    """The sender has connected and warmed all its workers to the Hello's engine. `pair` as in Hello."""

    card: EngineCard
    pair: int = 0


class Refuse(_Message, frozen=True, tag=True):
    """No exchange with the sender (at `address`). `field` is what differs."""

    incarnation: Incarnation
    address: Address
    reason: str
    field: str = ""


class Introduce(_Message, frozen=True, tag=True):
    """Engine to its own workers: connect to this peer, warm it, and tell the engine (Introduced). `own` is its card.

    `pair` is the peer's number of the pair: only its grants with this number are served.
    """

    card: EngineCard
    own: EngineCard
    pair: int = 0


class Introduced(_Message, frozen=True, tag=True):
    """Worker to its own engine. `error` is empty on success."""

    rank: Rank
    incarnation: Incarnation
    error: str = ""


class Replaced(_Message, frozen=True, tag=True):
    """Worker to its own engine: its data plane was made anew, and all its peers have to connect to this export."""

    rank: Rank
    export: bytes


class Dismiss(_Message, frozen=True, tag=True):
    """Engine to its own workers: that incarnation is gone (`dead`: proven, else only replaced)."""

    incarnation: Incarnation
    dead: bool


class PoolName(_Message, frozen=True, tag=True):
    """Engine to its own workers: the name of this engine's KV in the pool, and of the engine. Sent once the weights are
    known, and again when the name changes."""

    incarnation: Incarnation
    address: Address
    """Of the engine, which wants to hear of nodes (PoolNodes)."""
    description: str
    """Of the namespace (lmkv.hashing.Manifest)."""


class PoolNodes(_Message, frozen=True, tag=True):
    """Worker to its own engine: the pool nodes that this rank can load from, and whether it maps their arenas."""

    rank: Rank
    nodes: tuple[tuple[Incarnation, bool], ...]


# --- control plane: liveness ---


class Beat(_Message, frozen=True, tag=True):
    """Between paired workers, both ways. Renews every lease of the pair. Times are the sender's monotonic clock, s."""

    incarnation: Incarnation
    rank: Rank
    sent_s: float
    echo_s: float = 0.0
    """`sent_s` of the last Beat received, 0 if none; with `held_s` gives the round trip and the clock offset."""
    held_s: float = 0.0


# --- control plane: one transfer (all from or to worker ranks) ---


class Grant(_Message, frozen=True, tag=True):
    """Decode engine to every prefill rank: these blocks are yours to write until the lease ends.

    `block_ids[g][i]` is decode's block for block `first_block[g] + i` of the request in group g; id 0 (vLLM's null
    block) means "do not send". `first_token` is where the granted range starts, `prompt_tokens` where it ends.
    """

    incarnation: Incarnation
    transfer_id: TransferId
    epoch: Epoch
    first_token: Index
    prompt_tokens: Index
    first_block: tuple[Index, ...]
    block_ids: tuple[tuple[Index, ...], ...]
    sent_s: float
    landing: bool = False
    """Landing mode: `first_block` and `block_ids` count prefill's blocks, an id other than 0 only says "wanted"; slots
    to write into come with Credit from decode's ranks."""
    prompt_digest: bytes = b""
    """Decode's prompt (lmkv.vllm.prompt), 16 bytes. Nothing is written unless it equals prefill's; b"" never does."""
    pair: int = 0
    """Decode's number of the pair (Hello). A grant from before the pair was made anew is void."""


class Credit(_Message, frozen=True, tag=True):
    """Landing mode. Decode rank to prefill rank: these slots are yours for one write of this transfer each."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch
    slots: tuple[SlotIndex, ...]


class NotNeeded(_Message, frozen=True, tag=True):
    """Decode engine to every prefill rank: nothing to send for this transfer."""

    incarnation: Incarnation
    transfer_id: TransferId
    reason: str


class Parked(_Message, frozen=True, tag=True):
    """Prefill engine to decode engine: nobody asked for this KV in time; what is whole of it is in the pool."""

    incarnation: Incarnation
    transfer_id: TransferId


class Cancel(_Message, frozen=True, tag=True):
    """Decode rank to prefill rank: post no more; answer Cancelled once nothing of yours can land."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch


class Cancelled(_Message, frozen=True, tag=True):
    """Prefill rank to decode rank: nothing of this transfer and epoch will land any more."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch


class Failed(_Message, frozen=True, tag=True):
    """Prefill rank to decode rank: this transfer will not complete, and nothing of it will land any more."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch
    reason: str
    landed_bytes: Total = 0


# --- control plane: questions ---


class Describe(_Message, frozen=True, tag=True):
    """To an engine: who are you, and whom are you paired with?"""

    token: str


class Description(_Message, frozen=True, tag=True):
    token: str
    name: EngineName
    incarnation: Incarnation
    role: str
    peers: tuple[tuple[str, str], ...]
    """(name, incarnation) of ready peers."""
    counters: dict[str, int]
    private: str = ""
    """Why this engine's KV is its own alone (its weights cannot be identified), or ""."""
    trouble: str = ""
    """Why this engine exchanges no KV (any more), and computes every prompt itself."""


class Explain(_Message, frozen=True, tag=True):
    """To an engine: the ledger of one transfer."""

    token: str
    transfer_id: TransferId


class Explained(_Message, frozen=True, tag=True):
    token: str
    ledger: bytes
    """JSON, b"" if the transfer is not known (any more)."""


Control = (
    Meet | Met | Hello | Welcome | Refuse | Introduce | Introduced | Replaced | Dismiss | PoolName | PoolNodes | Beat
    | Grant | Credit | NotNeeded | Parked | Cancel | Cancelled | Failed | Describe | Description | Explain | Explained
)  # fmt: skip


# --- notes on the data plane ---


class WriteNote(_Message, frozen=True, tag="w"):
    """Came with a write: layers [layer_lo, layer_hi) of blocks [block_lo, block_hi) of `group` have landed.

    Block indices count from the start of the request. `checksum` is made before posting over the bytes of the write in
    the order layer, block; None where the receiver's card demands none for this write.
    """

    transfer_id: TransferId
    epoch: Epoch
    rank: Rank
    seq: Index
    group: Index
    layer_lo: Index
    layer_hi: Index
    block_lo: Index
    block_hi: Index
    payload_bytes: Total
    checksum: Unsigned | None
    slot: SlotIndex = -1
    """Landing mode: the slot that holds the bytes."""


class SealNote(_Message, frozen=True, tag="s"):
    """Everything of this rank has been posted: so many writes, so many bytes. May overtake the writes."""

    transfer_id: TransferId
    epoch: Epoch
    rank: Rank
    writes: Index
    payload_bytes: Total


class WarmNote(_Message, frozen=True, tag="p"):
    """First write of a pair; carries nothing."""

    incarnation: Incarnation


Note = WriteNote | SealNote | WarmNote

_encoder = msgspec.msgpack.Encoder()
_control_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)
_note_decoder: msgspec.msgpack.Decoder[Note] = msgspec.msgpack.Decoder(Note)

_T = TypeVar("_T")


def encode(message: Control | Note) -> bytes:
    return _encoder.encode(message)


def decode_control(payload: bytes) -> Control:
    """Raises WireError."""
    return _decode(_control_decoder, payload)


def decode_note(payload: bytes) -> Note:
    """Raises WireError."""
    return _decode(_note_decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_T], payload: bytes) -> _T:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        text = f"a message of {len(payload)} bytes cannot be read: {explain(error)}"
        raise WireError(text, code="LMKV-W201") from error
