"""The page table against a dictionary."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.control import prints as fingerprints
from lmkv.control import table as tables
from lmkv.control.holders import FLAG, HolderSets
from lmkv.control.pages import PageTable
from lmkv.control.table import SlotTable
from lmkv.errors import WireError


def put(table: SlotTable, pairs: dict[int, int]) -> None:
    keys = np.array(list(pairs), np.uint64)
    table.put(keys, table.locate(keys), np.array(list(pairs.values()), np.uint32))


def test_keys_and_records_have_the_same_fingerprints() -> None:
    namespace, other = os.urandom(16), os.urandom(16)
    keys = os.urandom(17 * 50)
    records = b"".join(namespace + keys[i : i + 17] + b"\x05" for i in range(0, len(keys), 17))
    prints, tiers = fingerprints.of_records(records)
    assert (prints == fingerprints.of_keys(namespace, keys)).all() and (tiers == 5).all()
    assert not np.isin(prints, fingerprints.of_keys(other, keys)).any()


def test_every_bit_of_a_key_counts() -> None:
    key = bytearray(os.urandom(33))
    seen = set()
    for bit in range(33 * 8):
        key[bit // 8] ^= 1 << bit % 8
        seen.add(int(fingerprints.of_keys(bytes(key[:16]), bytes(key[16:]))[0]))
        key[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 33 * 8
    # Both halves name buckets, so both have to spread.
    assert len({p & 0xFFFF for p in seen}) > 250 and len({p >> 32 & 0xFFFF for p in seen}) > 250


@pytest.mark.parametrize(("namespace", "keys"), [(b"", b"x" * 17), (b"n" * 16, b"x" * 16)])
def test_what_are_no_keys(namespace: bytes, keys: bytes) -> None:
    with pytest.raises(WireError):
        fingerprints.of_keys(namespace, keys)
    with pytest.raises(WireError):
        fingerprints.of_records(b"x" * 33)


def test_growth_keeps_everything_and_memory_small() -> None:
    rng = np.random.default_rng(3)
    table = SlotTable(8)
    keys = rng.integers(1, 2**64, 200_000, dtype=np.uint64)
    done = 0
    while done < len(keys):
        batch = keys[done : done + int(rng.integers(1, 3000))]
        table.put(batch, table.locate(batch), (batch & np.uint64(0xFFFF)).astype(np.uint32) + np.uint32(1))
        done += len(batch)
        assert len(table) == done and table.lost == 0
        if done > 20_000:
            assert table.memory_bytes / done < 30
    assert (table.find(keys) == (keys & np.uint64(0xFFFF)).astype(np.uint32) + 1).all()
    assert (table.find(rng.integers(1, 2**64, 1000, dtype=np.uint64)) == 0).all()


def test_coming_and_going_does_not_rot() -> None:
    """A million pages pass through a table of ten thousand: it stays as small, and exact."""
    rng = np.random.default_rng(4)
    table, live = SlotTable(8), np.zeros(0, np.uint64)
    sizes = set()
    for _ in range(400):
        fresh = rng.integers(1, 2**64, 2500, dtype=np.uint64)
        table.put(fresh, table.locate(fresh), np.ones(2500, np.uint32))
        live = np.concatenate((live, fresh))
        gone, live = live[:-10_000], live[-10_000:]
        if len(gone):
            table.put(gone, table.locate(gone), np.zeros(len(gone), np.uint32))
            assert (table.find(gone) == 0).all()
        sizes.add(table.buckets)
    assert len(table) == 10_000 and (table.find(live) == 1).all()
    assert max(sizes) * 8 < 12_500 / 0.55


def test_full_buckets_use_spare_slots_and_then_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys made to share their buckets: 8 or 16 fit, the rest waits in front, what has no place at all is counted."""
    table = SlotTable(8)
    same = {(i << 50 | 1 << 32 | 1): i + 1 for i in range(1, 41)}
    put(table, same)
    assert len(table) == 40 and len(table._spare) > 0
    keys = np.array(list(same), np.uint64)
    assert table.find(keys).tolist() == list(same.values())
    put(table, dict.fromkeys(list(same)[::2], 0))
    assert len(table) == 20
    assert table.find(keys).tolist() == [0 if i % 2 == 0 else v for i, v in enumerate(same.values())]
    places, values = table.part(0, table.buckets)
    assert sorted(values.tolist()) == sorted(list(same.values())[1::2]) and (table.read(places) == values).all()
    many = {(i << 50 | 1 << 32 | 1): 7 for i in range(1, 3000)}
    put(table, many)
    assert table.lost > 0 and len(table) + table.lost >= len(many)
    assert len(table) == int((table.find(np.array(list(many), np.uint64)) != 0).sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_are_a_dictionary(data: st.DataObject) -> None:
    table, model = SlotTable(8), dict[int, int]()
    seed = random.Random(data.draw(st.integers(0, 2**32)))
    pool = [seed.getrandbits(64) | 1 for _ in range(data.draw(st.integers(1, 400)))]
    # Some share a bucket, so that the odd ways are taken too.
    pool += [i << 45 | 3 << 32 | 3 for i in range(1, data.draw(st.integers(1, 60)))]
    for _ in range(data.draw(st.integers(1, 12))):
        some = seed.sample(pool, seed.randint(1, len(pool)))
        pairs = {key: seed.choice((0, 1, 2, 3)) for key in some}
        put(table, pairs)
        model |= pairs
        model = {key: value for key, value in model.items() if value}
        assert table.lost == 0 and len(table) == len(model)
        assert table.find(np.array(pool, np.uint64)).tolist() == [model.get(key, 0) for key in pool]


def test_sets_are_shared_and_end() -> None:
    sets = HolderSets()
    two, held = sets.change(5 << 3 | 1, 2, 3, 10)
    assert two & FLAG and not held and list(sets.members(two)) == [2 << 3 | 3, 5 << 3 | 1]
    assert sets.change(2 << 3 | 3, 5, 1, 4) == (two, False)
    three, held = sets.change(two, 9, 1, 14)
    assert not held and len(sets) == 1
    back, held = sets.change(three, 9, 0, 14)
    assert held and back & FLAG and len(sets) == 1
    assert sets.change(back, 5, 0, 14) == (2 << 3 | 3, True)
    assert len(sets) == 0


def holders(table: PageTable, prints: np.ndarray) -> list[dict[int, int]]:
    return [{m >> 3: m & 7 for m in table.members(v)} for v in table.find(prints).tolist()]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_pages_are_a_dictionary_of_dictionaries(seed: int, number_of_nodes: int) -> None:
    rng = np.random.default_rng(seed)
    table = PageTable()
    pool = rng.integers(1, 2**64, 150, dtype=np.uint64)
    numbers = [table.number() for _ in range(number_of_nodes)]
    model: dict[int, dict[int, int]] = {int(p): {} for p in pool}
    for _ in range(12):
        if rng.integers(4) == 0:
            dead = numbers.pop(int(rng.integers(len(numbers))))
            table.retire(dead)
            for nodes in model.values():
                nodes.pop(dead, None)
            table_numbers = table.number()
            assert table_numbers not in numbers
            numbers.append(table_numbers)
        count = int(rng.integers(1, 300))
        prints = rng.choice(pool, count)
        nodes = rng.choice(numbers, count).astype(np.uint32)
        masks = rng.integers(0, 8, count).astype(np.uint8)
        table.apply(prints, nodes, masks)
        for p, n, m in zip(prints.tolist(), nodes.tolist(), masks.tolist(), strict=True):
            model[p].pop(n, None)
            if m:
                model[p][n] = m
        if rng.integers(2):
            table.sweep(64)
        seen = [{n: m for n, m in h.items() if n in numbers} for h in holders(table, pool)]
        assert seen == [model[int(p)] for p in pool]
        for n in numbers:
            assert table.held(n) == sum(n in h for h in model.values())
    while table.unswept:
        table.sweep(128)
    assert holders(table, pool) == [model[int(p)] for p in pool]
    assert table.pages == sum(map(bool, model.values()))
    assert table.sets == len({tuple(sorted(h.items())) for h in model.values() if len(h) > 1})


def test_one_page_at_a_thousand_nodes() -> None:
    table = PageTable()
    prints = np.arange(1, 65, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    numbers = [table.number() for _ in range(1000)]
    for number in numbers:
        table.apply(prints, np.full(64, number, np.uint32), np.ones(64, np.uint8))
    assert table.sets == 1 and table.pages == 64
    assert (table.tiers(table.find(prints), numbers) == 1).all()
    for number in numbers[:999]:
        table.retire(number)
    while table.unswept:
        table.sweep()
    assert table.sets == 0 and holders(table, prints) == [{numbers[-1]: 1}] * 64


def test_spare_rows_are_no_buckets() -> None:
    assert tables._SPARE == tables._SPARE_ROWS * tables.SLOTS
