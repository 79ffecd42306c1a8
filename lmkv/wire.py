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
from .cards import PROTOCOL as PROTOCOL
from .cards import EngineCard as EngineCard
from .cards import LayerCard as LayerCard
from .cards import Message
from .cards import ProcessCard as ProcessCard
from .cards import Times as Times
from .cards import WorkerCard as WorkerCard
from .errors import WireError
from .ids import (
    EngineName,
    Epoch,
    Incarnation,
    Index,
    Rank,
    SlotIndex,
    Total,
    TransferId,
    Unsigned,
)

# --- control plane: pairing ---


class Meet(Message, frozen=True, tag=True):
    """To an engine: pair with the engine at `address`. Answered by Met when it is done or refused, which it is for an
    `address` that is none."""

    address: str
    token: str


class Met(Message, frozen=True, tag=True):
    """`name`/`incarnation` are the peer's; `refused` is empty when the pair is ready."""

    token: str
    name: str
    incarnation: str
    refused: str = ""


class Hello(Message, frozen=True, tag=True):
    """`pair` numbers the sender's side of the pair, and its grants: another one means that it makes the pair anew."""

    card: EngineCard
    pair: int = 0


class Welcome(Message, frozen=True, tag=True):
    """The sender has connected and warmed all its workers to the Hello's engine. `pair` as in Hello; `yours` is the
    receiver's number as the sender knows it."""

    card: EngineCard
    pair: int = 0
    yours: int = 0


class Refuse(Message, frozen=True, tag=True):
    """No exchange with the sender (at `address`). `field` is what differs."""

    incarnation: Incarnation
    address: Address
    reason: str
    field: str = ""


class Introduce(Message, frozen=True, tag=True):
    """Engine to its own workers: connect to this peer, warm it, and tell the engine (Introduced). `own` is its card.

    `pair` is the peer's number of the pair: only its grants with this number are served. `ours` is the engine's own.
    """

    card: EngineCard
    own: EngineCard
    pair: int = 0
    ours: int = 0


class Introduced(Message, frozen=True, tag=True):
    """Worker to its own engine. `error` is empty on success. `pair` and `ours` as in the Introduce that it answers."""

    rank: Rank
    incarnation: Incarnation
    error: str = ""
    pair: int = 0
    ours: int = 0


class Replaced(Message, frozen=True, tag=True):
    """Worker to its own engine: its data plane was made anew, and all its peers have to connect to this export."""

    rank: Rank
    export: bytes


class Broken(Message, frozen=True, tag=True):
    """Worker to its own engine, its last word: its loop has failed, and moves no KV any more."""

    rank: Rank
    reason: str


class Dismiss(Message, frozen=True, tag=True):
    """Engine to its own workers: that incarnation is gone (`dead`: proven, else only replaced)."""

    incarnation: Incarnation
    dead: bool


class PoolName(Message, frozen=True, tag=True):
    """Engine to its own workers: the name of this engine's KV in the pool, and of the engine. Sent once the weights are
    known, and again when the name changes."""

    incarnation: Incarnation
    address: Address
    """Of the engine, which wants to hear of nodes (PoolNodes)."""
    description: str
    """Of the namespace (lmkv.hashing.Manifest)."""


class PoolNodes(Message, frozen=True, tag=True):
    """Worker to its own engine: the pool nodes that this rank can load from, and whether it maps their arenas."""

    rank: Rank
    nodes: tuple[tuple[Incarnation, bool], ...]


# --- control plane: liveness ---


class Bury(Message, frozen=True, tag=True):
    """Whoever runs the engines to an engine: the processes of this incarnation have ended for certain."""

    token: str
    incarnation: Incarnation


class Buried(Message, frozen=True, tag=True):
    """The answer; `refused` says why it is not believed, or is empty."""

    token: str
    refused: str = ""


class Beat(Message, frozen=True, tag=True):
    """Between paired workers, both ways. Renews every lease of the pair. Times are the sender's monotonic clock, s."""

    incarnation: Incarnation
    rank: Rank
    sent_s: float
    echo_s: float = 0.0
    """`sent_s` of the last Beat received, 0 if none; with `held_s` gives the round trip and the clock offset."""
    held_s: float = 0.0


class Warmed(Message, frozen=True, tag=True):
    """Rank to rank: a WarmNote with this `serial` has come over your connection, and `pair` is our engine's number of
    the pair now. Grants with it may be served over that connection."""

    incarnation: Incarnation
    rank: Rank
    serial: int
    pair: int


# --- control plane: one transfer (all from or to worker ranks) ---


class Grant(Message, frozen=True, tag=True):
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


class Credit(Message, frozen=True, tag=True):
    """Landing mode. Decode rank to prefill rank: these slots are yours for one write of this transfer each."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch
    slots: tuple[SlotIndex, ...]


class NotNeeded(Message, frozen=True, tag=True):
    """Decode engine to every prefill rank: nothing to send for this transfer."""

    incarnation: Incarnation
    transfer_id: TransferId
    reason: str


class Parked(Message, frozen=True, tag=True):
    """Prefill engine to decode engine: nobody asked for this KV in time, and it is gone; what is whole of it is in the
    pool, if there is one."""

    incarnation: Incarnation
    transfer_id: TransferId


class Cancel(Message, frozen=True, tag=True):
    """Decode rank to prefill rank: post no more; answer Cancelled once nothing of yours can land."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch


class Cancelled(Message, frozen=True, tag=True):
    """Prefill rank to decode rank: nothing of this transfer and epoch will land any more."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch


class Failed(Message, frozen=True, tag=True):
    """Prefill rank to decode rank: this transfer will not complete, and nothing of it will land any more."""

    incarnation: Incarnation
    rank: Rank
    transfer_id: TransferId
    epoch: Epoch
    reason: str
    landed_bytes: Total = 0


# --- control plane: questions ---


class Describe(Message, frozen=True, tag=True):
    """To an engine: who are you, and whom are you paired with?"""

    token: str


class Description(Message, frozen=True, tag=True):
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
    """What of lmkv has died in this engine: why it exchanges no KV any more and computes every prompt itself, or why it
    does not use the pool."""


class Explain(Message, frozen=True, tag=True):
    """To an engine: the ledger of one transfer."""

    token: str
    transfer_id: TransferId


class Explained(Message, frozen=True, tag=True):
    token: str
    ledger: bytes
    """JSON, b"" if the transfer is not known (any more)."""


Control = (
    Meet | Met | Hello | Welcome | Refuse | Introduce | Introduced | Replaced | Broken | Dismiss | PoolName | PoolNodes
    | Beat | Warmed | Grant | Credit | NotNeeded | Parked | Cancel | Cancelled | Failed | Describe | Description
    | Explain | Explained | Bury | Buried
)  # fmt: skip


# --- notes on the data plane ---


class WriteNote(Message, frozen=True, tag="w"):
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


class SealNote(Message, frozen=True, tag="s"):
    """Everything of this rank has been posted: so many writes, so many bytes. May overtake the writes."""

    transfer_id: TransferId
    epoch: Epoch
    rank: Rank
    writes: Index
    payload_bytes: Total


class WarmNote(Message, frozen=True, tag="p"):
    """With a write that nobody reads; answered by Warmed. `serial` numbers the writer's connection."""

    incarnation: Incarnation
    serial: int = 0


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
