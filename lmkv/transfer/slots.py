"""Who may write into which landing slot. Pure; decode's worker loop owns one.

A writer (one prefill rank of one transfer) is lent slots by credit. A slot is free again when what landed in it has
been taken out, or when nothing can land in it any more (`close`); never earlier, so a slot that a lost peer holds stays
in quarantine. Free slots go round: first to writers without any, then to those with the fewest.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from lmkv.ids import Epoch, Incarnation, TransferId

from .events import Peer

FIRST = 2


@dataclass(frozen=True, slots=True)
class Borrower:
    """One writer of one grant."""

    peer: Peer
    transfer_id: TransferId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Loan:
    """Tell the borrower that these slots are its own for one write each."""

    borrower: Borrower
    slots: tuple[int, ...]


@dataclass(slots=True)
class _Account:
    held: set[int] = field(default_factory=set)
    hungry: bool = True
    active: bool = False
    """Something of it has landed. Until then it holds few: its prompt may be far from computed."""


class SlotRing:
    """`count` slots; a writer holds at most `per_writer` of them, and `FIRST` until it has used one."""

    def __init__(self, count: int, per_writer: int) -> None:
        self._free: deque[int] = deque(range(count))
        self._per_writer = per_writer
        self._accounts: dict[Borrower, _Account] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def held(self, borrower: Borrower) -> frozenset[int]:
        account = self._accounts.get(borrower)
        return frozenset(account.held) if account else frozenset()

    def open(self, borrower: Borrower) -> list[Loan]:
        """A writer that will need slots. Opening it again changes nothing."""
        self._accounts.setdefault(borrower, _Account())
        return self._lend()

    def taken_out(self, borrower: Borrower, slot: int) -> list[Loan]:
        """The slot's content has been taken out; whoever has the fewest gets it. A slot not lent to this writer is
        refused by an empty answer (see `held`)."""
        account = self._accounts.get(borrower)
        if account is None or slot not in account.held:
            return []
        account.held.remove(slot)
        account.active = True
        self._free.append(slot)
        return self._lend()

    def sated(self, borrower: Borrower) -> None:
        """The writer will post nothing more than it has slots for, or its transfer has failed: it gets no more."""
        if borrower in self._accounts:
            self._accounts[borrower].hungry = False

    def close(self, borrower: Borrower) -> list[Loan]:
        """Nothing of this writer can land any more: its slots are free."""
        account = self._accounts.pop(borrower, None)
        if account is None:
            return []
        self._free.extend(sorted(account.held))
        return self._lend()

    def _most(self, account: _Account) -> int:
        return self._per_writer if account.active else min(FIRST, self._per_writer)

    def _lend(self) -> list[Loan]:
        """Round by round, one slot each to those with the fewest, so that none starves."""
        lent: dict[Borrower, list[int]] = {}
        holds: Counter[Incarnation] = Counter()
        for borrower, account in self._accounts.items():
            holds[borrower.peer.incarnation] += len(account.held)
        while self._free:
            modest = {engine for engine, held in holds.items() if held < len(self._free)}
            hungry = [
                b
                for b, a in self._accounts.items()
                if a.hungry and len(a.held) < self._most(a) and b.peer.incarnation in modest
            ]
            if not hungry:
                break
            borrower = min(hungry, key=lambda b: len(self._accounts[b].held))
            slot = self._free.popleft()
            self._accounts[borrower].held.add(slot)
            holds[borrower.peer.incarnation] += 1
            lent.setdefault(borrower, []).append(slot)
        return [Loan(borrower, tuple(slots)) for borrower, slots in lent.items()]
