"""Eviction policies: against plain models, with pinned keys, and what they may cost."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.errors import ConfigError
from lmkv.pool.policy import LRU, Policy, S3Fifo, make_policy

NAMES = ("s3fifo", "lru")
KEYS = [bytes([i]) for i in range(24)]


def evict(policy: Policy, count: int = 1, pinned: frozenset[bytes] = frozenset()) -> list[bytes]:
    """As the pool does it; fewer than `count` where only pinned keys are left."""
    gone = []
    for key in policy.victims():
        if key in pinned:
            continue
        policy.evicted(key)
        gone.append(key)
        if len(gone) == count:
            break
    return gone


class PlainLRU:
    def __init__(self) -> None:
        self.keys: list[bytes] = []

    def use(self, key: bytes) -> None:
        if key in self.keys:
            self.keys.append(self.keys.pop(self.keys.index(key)))

    def evict(self, pinned: frozenset[bytes]) -> list[bytes]:
        first = next((key for key in self.keys if key not in pinned), None)
        passed = self.keys if first is None else self.keys[: self.keys.index(first)]
        self.keys = self.keys[len(passed) + (first is not None) :] + passed
        return [] if first is None else [first]


class PlainS3Fifo:
    """Algorithm 1 of the paper, word by word, with lists; sizes are 1."""

    def __init__(self) -> None:
        self.small: list[list[object]] = []
        self.main: list[list[object]] = []
        self.ghosts: list[bytes] = []

    def held(self) -> list[object]:
        return [key for key, _ in self.small + self.main]

    def add(self, key: bytes) -> None:
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append([key, 0])
        elif key not in self.held():
            self.small.append([key, 0])

    def use(self, key: bytes) -> None:
        for entry in self.small + self.main:
            if entry[0] == key:
                entry[1] = min(int(str(entry[1])) + 1, 3)

    def remove(self, key: bytes) -> None:
        self.small = [entry for entry in self.small if entry[0] != key]
        self.main = [entry for entry in self.main if entry[0] != key]
        self.ghosts = [ghost for ghost in self.ghosts if ghost != key]
        self.trim()

    def evict(self) -> list[object]:
        while self.small or self.main:
            if len(self.small) >= 0.1 * len(self.held()):
                key, count = self.small.pop(0)
                if int(str(count)) > 1:
                    self.main.append([key, 0])
                    continue
                self.ghosts.append(bytes(key))  # type: ignore[call-overload]
            else:
                key, count = self.main.pop(0)
                if int(str(count)) > 0:
                    self.main.append([key, int(str(count)) - 1])
                    continue
            self.trim()
            return [key]
        return []

    def trim(self) -> None:
        while len(self.ghosts) > 0.9 * len(self.held()):
            self.ghosts.pop(0)


steps = st.lists(
    st.tuples(st.sampled_from(["add", "add", "use", "use", "remove", "evict", "evict"]), st.sampled_from(KEYS)),
    max_size=200,
)


@given(steps, st.frozensets(st.sampled_from(KEYS)))
def test_lru_is_the_plain_one_with_pinned_keys_too(run: list[tuple[str, bytes]], pinned: frozenset[bytes]) -> None:
    policy, plain = LRU(), PlainLRU()
    for what, key in run:
        if what == "add":
            policy.added(key, 1)
            plain.keys += [] if key in plain.keys else [key]
        elif what == "use":
            policy.touched(key)
            plain.use(key)
        elif what == "remove":
            policy.removed(key)
            plain.keys = [other for other in plain.keys if other != key]
        else:
            assert evict(policy, 1, pinned) == plain.evict(pinned)
    assert len(policy) == len(plain.keys)
    assert evict(policy, 99) == plain.keys


@given(steps)
def test_s3fifo_is_the_papers(run: list[tuple[str, bytes]]) -> None:
    policy, plain = S3Fifo(), PlainS3Fifo()
    for what, key in run:
        if what == "add":
            policy.added(key, 1)
            plain.add(key)
        elif what == "use":
            policy.touched(key)
            plain.use(key)
        elif what == "remove":
            policy.removed(key)
            plain.remove(key)
        else:
            assert evict(policy) == plain.evict()
        assert (len(policy), policy.ghosts) == (len(plain.held()), len(plain.ghosts))


@pytest.mark.parametrize("name", NAMES)
@given(run=steps, pinned=st.frozensets(st.sampled_from(KEYS)), sizes=st.lists(st.integers(1, 9), min_size=24))
def test_a_pass_offers_each_key_once_and_loses_none(
    name: str, run: list[tuple[str, bytes]], pinned: frozenset[bytes], sizes: list[int]
) -> None:
    policy = make_policy(name)
    held: set[bytes] = set()
    for what, key in run:
        if what == "add":
            policy.added(key, sizes[key[0] % len(sizes)])
            held.add(key)
        elif what == "use":
            policy.touched(key)
        elif what == "remove":
            policy.removed(key)
            held.discard(key)
        else:
            gone = evict(policy, 1, pinned)
            assert len(gone) == (1 if held - pinned else 0)
            assert set(gone) <= held - pinned
            held -= set(gone)
        assert len(policy) == len(held)
    offered = list(policy.victims())
    assert sorted(offered) == sorted(held), "nothing was taken, so all were offered, each once"
    assert sorted(evict(policy, 99, pinned)) == sorted(held - pinned)
    assert sorted(evict(policy, 99)) == sorted(held & pinned), "pinned keys are still there"
    assert len(policy) == 0


@pytest.mark.parametrize("name", NAMES)
def test_looking_at_the_next_victim_changes_nothing(name: str) -> None:
    policy = make_policy(name)
    for key in KEYS:
        policy.added(key, 1)
    policy.touched(KEYS[0])
    assert next(policy.victims()) == next(policy.victims())
    ahead = list(islice(policy.victims(), 3))
    for key in ahead:
        policy.evicted(key)
    assert len(policy) == len(KEYS) - 3
    assert not set(ahead) & set(policy.victims())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_removed_during_a_pass_is_not_offered(name: str) -> None:
    policy = make_policy(name)
    for key in KEYS:
        policy.added(key, 1)
    offered = []
    for key in policy.victims():
        offered.append(key)
        if key == KEYS[3]:
            policy.removed(KEYS[7])
            policy.removed(KEYS[1])
    assert offered == [key for key in KEYS if key != KEYS[7]]


@pytest.mark.parametrize("name", NAMES)
def test_pinned_keys_are_not_gone_through_again_and_again(name: str) -> None:
    policy, pinned = make_policy(name), frozenset(b"p%d" % i for i in range(2_000))
    for key in sorted(pinned):
        policy.added(key, 1)
    for i in range(2_000):
        policy.added(b"f%d" % i, 1)
    offered = 0
    for _ in range(2_000):
        for key in policy.victims():
            offered += 1
            if key not in pinned:
                policy.evicted(key)
                break
    assert len(policy) == 2_000
    assert offered <= 2 * 4_000


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keys_are_ignored(name: str) -> None:
    policy = make_policy(name)
    policy.touched(b"x")
    policy.removed(b"x")
    policy.evicted(b"x")
    assert (len(policy), list(policy.victims())) == (0, [])


def with_main_queue() -> S3Fifo:
    """Two pages of 45 bytes in the main queue, nothing else."""
    policy = S3Fifo()
    for key in (b"gone", b"hot1", b"hot2"):
        policy.added(key, 45)
        policy.touched(key)
        policy.touched(key)
    assert evict(policy, 1) == [b"gone"], "all were promoted, then there is nothing else"
    return policy


@pytest.mark.parametrize(("size", "victim"), [(9, b"hot1"), (11, b"new")])
def test_the_small_queue_is_a_tenth_by_bytes(size: int, victim: bytes) -> None:
    policy = with_main_queue()
    policy.added(b"new", size)
    assert evict(policy, 1) == [victim]


@pytest.mark.parametrize(("size", "victim"), [(9, b"hot1"), (11, b"new")])
def test_a_known_page_may_change_its_size(size: int, victim: bytes) -> None:
    policy = with_main_queue()
    policy.added(b"new", 10)
    policy.added(b"new", size)
    assert evict(policy, 1) == [victim]


def test_a_flood_passes_by_what_is_used() -> None:
    hot = KEYS[:10]

    def after_flood(policy: Policy) -> int:
        for key in hot:
            policy.added(key, 1)
        for _ in range(2):
            for key in hot:
                policy.touched(key)
        for i in range(1_000):
            if len(policy) == 20:
                evict(policy)
            policy.added(b"flood%d" % i, 1)
        return len(set(hot) & set(policy.victims()))

    assert after_flood(S3Fifo()) == len(hot)
    assert after_flood(LRU()) == 0


def test_what_comes_back_soon_goes_to_the_main_queue() -> None:
    policy = S3Fifo()
    for key in KEYS[:10]:
        policy.added(key, 1)
    assert evict(policy, 2) == KEYS[:2]
    policy.added(KEYS[0], 1)
    assert evict(policy, 8) == KEYS[2:10], "new pages go before it"
    policy.removed(KEYS[0])
    assert (len(policy), policy.ghosts) == (0, 0)


def test_a_dropped_page_is_not_remembered() -> None:
    policy = S3Fifo()
    for key in KEYS[:10]:
        policy.added(key, 1)
    evict(policy, 1)
    assert policy.ghosts == 1
    policy.removed(KEYS[0])
    assert policy.ghosts == 0


@settings(max_examples=20)
@given(st.integers(1, 50))
def test_ghosts_are_bounded_by_what_is_held(capacity: int) -> None:
    policy = S3Fifo()
    for i in range(20 * capacity):
        if len(policy) == capacity:
            evict(policy)
        policy.added(b"%d" % i, 1)
        assert policy.ghosts <= len(policy)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'arc'.*s3fifo, lru"):
        make_policy("arc")
