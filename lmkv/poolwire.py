"""Every message of the shared cache pool: to and from pool nodes and controllers, as msgspec Structs; no pickle.

A node and a controller each bind a ROUTER. Whoever asks connects a DEALER and gets its answers there, with the token of
the question; answers may come late, twice or in any order. Messages without a token are one-way. Events travel on a PUB
socket of their own, one frame each.

**Keys.** A *page key* is chunk key ‖ group, 17 bytes; with the namespace's 16 bytes before it, it is an *object key* of
33 bytes (`lmkv.hashing`). Many of them travel as one bytes object, one after the other.

Growth: as in `lmkv.wire`.
"""

from __future__ import annotations

import msgspec

from .addresses import explain
from .errors import WireError
from .ids import Incarnation, Rank
from .poolterms import EVENT_BYTES as EVENT_BYTES
from .poolterms import NAMESPACE_BYTES as NAMESPACE_BYTES
from .poolterms import OBJECT_KEY_BYTES as OBJECT_KEY_BYTES
from .poolterms import PAGE_KEY_BYTES as PAGE_KEY_BYTES
from .poolterms import Ack as Ack
from .poolterms import Holder as Holder
from .poolterms import Member as Member
from .poolterms import NodeCard as NodeCard
from .poolterms import Page as Page
from .poolterms import Refusal as Refusal
from .poolterms import Slot as Slot
from .poolterms import Tier as Tier
from .poolterms import split_keys as split_keys
from .wire import PROTOCOL, ProcessCard


class _Message(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Array-encoded, tagged by class name."""


# --- a client of a node ---


class PoolHello(_Message, frozen=True):
    """First message of a client: who it is, and how the node may write to it (`export` empty: it maps the arena, or
    only asks). `namespaces` are those it will speak of, with their descriptions (JSON)."""

    token: int
    incarnation: Incarnation
    rank: Rank
    name: str
    export: bytes = b""
    scratch_address: int = 0
    scratch_bytes: int = 0
    namespaces: tuple[tuple[bytes, str], ...] = ()
    protocol: int = PROTOCOL
    settled: tuple[int, int] = (0, 0)
    """The sender writes no more to slots that it was given by Reserve questions with tokens in [first, last)."""
    process: ProcessCard = ProcessCard()
    fetches: tuple[int, ...] = ()
    """Tokens of Fetch questions whose end the sender does not know. Of these, none that comes late is served."""


class PoolWelcome(_Message, frozen=True):
    """`refused` is empty, or says why the node does not serve this client."""

    token: int
    card: NodeCard
    refused: str = ""
    writing: tuple[int, ...] | None = None
    """Those of the `fetches` asked about that are still being written; None: an older node, which does not say."""


class Declare(_Message, frozen=True):
    """A further namespace and its description. One-way."""

    namespace: bytes
    description: str


class Reserve(_Message, frozen=True):
    """Slots for pages of `page_bytes`, to be written in `shards` shares; the sender writes share `shard`. All ranks of
    one writer (incarnation) get the same slots, each once: who asks again for what it has is told BUSY. Nothing is
    visible before every share is committed."""

    token: int
    incarnation: Incarnation
    rank: Rank
    namespace: bytes
    keys: bytes
    page_bytes: int
    shards: int
    shard: int


class Reserved(_Message, frozen=True):
    """By key. `lease_s`: start no write later than this after the question was sent."""

    token: int
    slots: tuple[Slot, ...]
    lease_s: float


class Commit(_Message, frozen=True):
    """Share `shard` of these pages is written, all of it. `checksums`: by key, the shares' parts in order (see
    `PagePart`). Answered by Committed, at once or when `ack` is reached (at the latest after `wait_s`)."""

    token: int
    incarnation: Incarnation
    rank: Rank
    namespace: bytes
    keys: bytes
    generations: tuple[int, ...]
    shard: int
    checksums: tuple[tuple[int, ...], ...]
    ack: Ack = Ack.VOLATILE
    wait_s: float = 0.0


class Committed(_Message, frozen=True):
    """By key: NONE or why not. `reached`: what all of those committed have reached."""

    token: int
    refusals: tuple[Refusal, ...]
    reached: Ack = Ack.VOLATILE


class Abandon(_Message, frozen=True):
    """One-way: these slots will not be committed. `drained`: nothing of the sender's can land there any more;
    otherwise they stay in quarantine until that is proved. `question`: instead of generations, the token of a Reserve
    whose answer has not come and will not be used."""

    incarnation: Incarnation
    rank: Rank
    namespace: bytes
    keys: bytes
    generations: tuple[int, ...]
    drained: bool
    question: int = 0


class Pin(_Message, frozen=True):
    """The longest run of these pages, from the first on, held in place for `lease_s`. Pages of lower tiers are brought
    up first, for at most `wait_s`; what is not up by then ends the run."""

    token: int
    incarnation: Incarnation
    rank: Rank
    namespace: bytes
    keys: bytes
    lease_s: float
    wait_s: float = 0.0


class Pinned(_Message, frozen=True):
    """`lease` names the pin. `why`: what ended the run before the last key. `below`: so many pages right behind the run
    are in lower tiers, and would be up after about `below_s` (ask again, with that as `wait_s`)."""

    token: int
    lease: int
    lease_s: float
    page_bytes: int
    pages: tuple[Page, ...]
    why: Refusal = Refusal.NONE
    below: int = 0
    below_s: float = 0.0


class Fetch(_Message, frozen=True):
    """Write `size` bytes from byte `first` on of each of these pages, which `lease` holds, to these addresses of the
    sender's registered host memory. Answered by Fetched when nothing of it will be written any more."""

    token: int
    incarnation: Incarnation
    rank: Rank
    lease: int
    namespace: bytes
    keys: bytes
    first: int
    size: int
    addresses: tuple[int, ...]


class Fetched(_Message, frozen=True):
    """`error` is empty if all of it is there."""

    token: int
    error: str = ""


class Unpin(_Message, frozen=True):
    """One-way. `corrupt`: page keys among the pinned whose bytes had another checksum; the node throws these pages
    away, in all tiers, provided that the lease was not over."""

    lease: int
    namespace: bytes = b""
    corrupt: bytes = b""


class Touch(_Message, frozen=True):
    """One-way: these were used (from another copy); they are worth keeping."""

    namespace: bytes
    keys: bytes


class Drop(_Message, frozen=True):
    """Forget these pages in all tiers; without keys the whole namespace, without a namespace everything."""

    token: int
    namespace: bytes = b""
    keys: bytes = b""


class Demote(_Message, frozen=True):
    """Give up the copies in memory of pages that a lower tier has as well; without keys, of the whole namespace,
    without a namespace of all. Answered by Dropped."""

    token: int
    namespace: bytes = b""
    keys: bytes = b""


class Dropped(_Message, frozen=True):
    token: int
    pages: int


class Drain(_Message, frozen=True):
    """Take nothing new, write everything that only memory holds to the lower tiers; `stop`: then end."""

    token: int
    stop: bool = False


class Drained(_Message, frozen=True):
    """`volatile`: pages that no lower tier would take, still in memory only."""

    token: int
    volatile: int


class ListKeys(_Message, frozen=True):
    """Up to `limit` object keys behind `after`, in byte order."""

    token: int
    namespace: bytes
    after: bytes
    limit: int


class Keys(_Message, frozen=True):
    """`records` are EVENT_BYTES each: object key and tiers."""

    token: int
    records: bytes
    more: bool


class Replicate(_Message, frozen=True):
    """To a node: copy these pages from the node with that card. Answered by Replicated if there is a token."""

    source: NodeCard
    namespace: bytes
    keys: bytes
    token: int = 0


class Replicated(_Message, frozen=True):
    """So many of the pages are here."""

    token: int
    pages: int


class Stats(_Message, frozen=True):
    token: int


class StatsAre(_Message, frozen=True):
    """JSON: capacities, occupancy, counters, namespaces with their descriptions."""

    token: int
    card: NodeCard
    stats: bytes


class Snapshot(_Message, frozen=True):
    """What a node holds, part by part: `cursor` b"" first, then what the part before said."""

    token: int
    cursor: bytes


class SnapshotPart(_Message, frozen=True):
    """`records` (EVENT_BYTES each) as they were after event `seq`. `cursor` is b"" with the last part.

    Events are states, so a reader that keeps every event after the first part's `seq` and applies them after the last
    part is exact.
    """

    token: int
    incarnation: Incarnation
    seq: int
    records: bytes
    cursor: bytes


class Events(_Message, frozen=True):
    """On PUB: events `first`, `first` + 1, … of this incarnation, numbered from 1; `records` as in SnapshotPart.
    `cleared`: before them, everything of this node is gone (that is event `first` - 1). Without records it is a sign of
    life: `first` is the next event's number."""

    incarnation: Incarnation
    first: int
    records: bytes
    cleared: bool = False


# --- controllers ---


class NodeBeat(_Message, frozen=True):
    """Node to controller, one-way, every beat: here I am."""

    card: NodeCard
    seq: int
    """Of its last event."""
    pages: int
    used_bytes: int
    capacity_bytes: int
    draining: bool = False
    leaving: bool = False
    """An orderly end: the last beat."""


class Members(_Message, frozen=True):
    token: int


class MembersAre(_Message, frozen=True):
    token: int
    name: str
    nodes: tuple[Member, ...]


class Lookup(_Message, frozen=True):
    """Who holds these pages? `least`: nodes with a shorter run from the first key on are left out. `most`: at most so
    many nodes (0: all). The longest runs come first."""

    token: int
    namespace: bytes
    keys: bytes
    least: int = 1
    most: int = 0


class Found(_Message, frozen=True):
    """`exact`: every member's state was EXACT, so an absence is one."""

    token: int
    holders: tuple[Holder, ...]
    exact: bool


class Unreadable(_Message, frozen=True):
    """The answer to a question that the receiver does not take."""

    token: int
    error: str


PoolMessage = (
    PoolHello | PoolWelcome | Declare | Reserve | Reserved | Commit | Committed | Abandon | Pin
    | Pinned | Fetch | Fetched | Unpin | Touch | Drop | Demote | Dropped | Drain | Drained | ListKeys | Keys
    | Replicate | Replicated | Stats | StatsAre | Snapshot | SnapshotPart | Events | NodeBeat | Members
    | MembersAre | Lookup | Found | Unreadable
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[PoolMessage] = msgspec.msgpack.Decoder(PoolMessage)


def encode(message: PoolMessage) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes) -> PoolMessage:
    """Raises WireError."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        text = f"a message of {len(payload)} bytes cannot be read: {explain(error)}"
        raise WireError(text, code="LMKV-W201") from error
