"""Who gets a slot of the arena, and who has to go for it. Pure.

One eviction order a size class. A class that needs room gives up its own first victim, unless another class has a whole
slab that was used less lately: so memory goes over from a model that nobody asks for to one that is.
"""

from __future__ import annotations

from collections.abc import Callable

from .arena import Arena, class_bytes
from .entry import NOWHERE, Entry
from .policy import Policy


class Room:
    """Slots and policies. `evicted(entry)` is told of what has lost its slot for others. Not thread-safe."""

    def __init__(
        self, arena: Arena, policy_for: Callable[[], Policy], evicted: Callable[[Entry], None], first_generation: int
    ) -> None:
        self._arena = arena
        self._policy_for = policy_for
        self._evicted = evicted
        self._policies: dict[int, Policy] = {}
        self._slots: dict[int, Entry] = {}
        """By offset: whoever has a slot, whatever its state."""
        self._keys: dict[bytes, Entry] = {}
        """What may be evicted, if it is not held: PRESENT in memory."""
        self.next_generation = first_generation
        self._uses = 0

    @property
    def used_bytes(self) -> int:
        return self._arena.used_bytes

    def place(self, entry: Entry) -> bool:
        """Give it a slot and a generation, evicting what has to go; False when too much is held."""
        size = class_bytes(entry.page_bytes)
        if size > self._arena.capacity_bytes:
            return False
        offset = self._arena.allocate(size)
        while offset is None:
            if not self._evict_for(size):
                return False
            offset = self._arena.allocate(size)
        entry.offset, entry.generation = offset, self.next_generation
        self.next_generation += 1
        self._slots[offset] = entry
        return True

    def free(self, entry: Entry) -> None:
        """Its slot, if it has one, is nobody's from now on."""
        if entry.offset != NOWHERE:
            del self._slots[entry.offset]
            self._arena.free(entry.offset)
            entry.offset = NOWHERE

    def enter(self, entry: Entry) -> None:
        """The slot has the page's bytes: it may be evicted from now on."""
        self._keys[entry.key] = entry
        self._policy(entry).added(entry.key, class_bytes(entry.page_bytes))
        self._use(entry)

    def leave(self, entry: Entry) -> None:
        """Not to be evicted: dropped."""
        if self._keys.get(entry.key) is entry:
            del self._keys[entry.key]
            self._policy(entry).removed(entry.key)

    def touch(self, entry: Entry) -> None:
        if self._keys.get(entry.key) is entry:
            self._policy(entry).touched(entry.key)
            self._use(entry)

    def _use(self, entry: Entry) -> None:
        self._uses += 1
        entry.used = self._uses

    def _policy(self, entry: Entry) -> Policy:
        size = class_bytes(entry.page_bytes)
        policy = self._policies.get(size)
        if policy is None:
            policy = self._policies[size] = self._policy_for()
        return policy

    # --- eviction ---

    def _evict_for(self, size: int) -> bool:
        own = self._victim(size)
        slab = self._slab_of_others(size, own)
        if slab:
            for entry in slab:
                self.evict(entry)
        elif own is not None:
            self.evict(own)
        return bool(slab) or own is not None

    def _victim(self, size: int) -> Entry | None:
        policy = self._policies.get(size)
        for key in policy.victims() if policy is not None else ():
            entry = self._keys[key]
            if entry.holds == 0:
                return entry
        return None

    def _slab_of_others(self, size: int, own: Entry | None) -> list[Entry]:
        """A slab of another class to give up, without anything that is held: with `own`, only one that is colder."""
        others = sorted(((other * n, other) for other, n in self._arena.classes.items() if other != size), reverse=True)
        for _, other in others:
            policy = self._policies.get(other)
            tried: set[int] = set()
            for key in policy.victims() if policy is not None else ():
                victim = self._keys[key]
                if own is not None and victim.used >= own.used:
                    break
                slab = self._arena.slab(victim.offset)
                if slab in tried:
                    continue
                tried.add(slab)
                entries = [self._slots[offset] for offset in self._arena.neighbours(victim.offset)]
                free = all(entry.holds == 0 and self._keys.get(entry.key) is entry for entry in entries)
                if free and (own is None or sum(e.used for e in entries) < own.used * len(entries)):
                    return entries
                if own is not None:
                    break
        return []

    def evict(self, entry: Entry) -> None:
        """Nobody holds it: its slot is free from now on."""
        del self._keys[entry.key]
        self._policy(entry).evicted(entry.key)
        self.free(entry)
        self._evicted(entry)
