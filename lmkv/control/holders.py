"""Who holds a page, as 4 bytes: one node with its tiers, or the number of an interned set of several.

Pages of one chain lie at the same nodes, so there are few sets beside the pages. A *member* is node << 3 | tiers; a
value is 0 (nobody), a member, or FLAG | set number.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

FLAG = 1 << 31
NODES = 1 << 28
_TIERS = 7


class HolderSets:
    """Each set counts the pages that use it and ends with the last. A set's members are sorted; there are at least
    two."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._sets: list[bytes] = []
        self._pages: list[int] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def members(self, value: int) -> array[int]:
        if value & FLAG:
            return array("I", self._sets[value ^ FLAG])
        return array("I", (value,) if value else ())

    def change(self, value: int, node: int, tiers: int, pages: int) -> tuple[int, bool]:
        """So many pages with this value are now at `node` in `tiers` (0: not at all). The new value, and whether the
        node held them before."""
        members = self.members(value)
        at = bisect_left(members, node << 3)
        held = at < len(members) and members[at] >> 3 == node
        if held:
            del members[at]
        if tiers:
            members.insert(at, node << 3 | tiers)
        return self._replace(value, members, pages), held

    def without(self, value: int, dead: frozenset[int], pages: int) -> int:
        """The value of these pages when no node of `dead` holds them."""
        members = array("I", (member for member in self.members(value) if member >> 3 not in dead))
        return self._replace(value, members, pages)

    def _replace(self, value: int, members: array[int], pages: int) -> int:
        fresh = self._take(members, pages)
        if value & FLAG:
            self._give(value ^ FLAG, pages)
        return fresh

    def _take(self, members: array[int], pages: int) -> int:
        if len(members) < 2:
            return members[0] if members else 0
        key = members.tobytes()
        number = self._numbers.get(key)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._sets[number] = key
            else:
                number = len(self._sets)
                self._sets.append(key)
                self._pages.append(0)
            self._numbers[key] = number
        self._pages[number] += pages
        return FLAG | number

    def _give(self, number: int, pages: int) -> None:
        self._pages[number] -= pages
        if self._pages[number] == 0:
            del self._numbers[self._sets[number]]
            self._sets[number] = b""
            self._free.append(number)
