"""Messages about transfers that came before what they need. Loop thread only; all of it is bounded."""

from __future__ import annotations

from collections import OrderedDict, deque

from lmkv import wire
from lmkv.ids import Incarnation, TransferId

_TRANSFERS = 1024
_SLOTS = 1024
"""Of credits for one transfer; each credit counts for one more."""
_GRANTS = 1024


class Early:
    """Credits whose grant has not come, and grants of pairs that are not known yet or whose connections are not
    confirmed.

    The two sides of a pair become ready one after the other, and a grant takes another way than the introduction.
    """

    def __init__(self) -> None:
        self._credits: OrderedDict[TransferId, list[wire.Credit]] = OrderedDict()
        self._grants: deque[wire.Grant] = deque(maxlen=_GRANTS)

    def hold_credit(self, credit: wire.Credit) -> None:
        held = self._credits.setdefault(credit.transfer_id, [])
        if sum(1 + len(early.slots) for early in held) + len(credit.slots) < _SLOTS:
            held.append(credit)
        while len(self._credits) > _TRANSFERS:
            self._credits.popitem(last=False)

    def take_credits(self, tid: TransferId) -> list[wire.Credit]:
        return self._credits.pop(tid, [])

    def hold_grant(self, grant: wire.Grant) -> None:
        self._grants.append(grant)

    def take_grants(self, incarnation: Incarnation) -> list[wire.Grant]:
        """Grants of that engine, in the order in which they came."""
        taken = [grant for grant in self._grants if grant.incarnation == incarnation]
        self._grants = deque((g for g in self._grants if g.incarnation != incarnation), maxlen=_GRANTS)
        return taken

    def cancel(self, tid: TransferId) -> None:
        """The transfer is over: its grants are void."""
        self._grants = deque((grant for grant in self._grants if grant.transfer_id != tid), maxlen=_GRANTS)
