"""What may be paired, and how a refusal reads."""

from __future__ import annotations

import pytest

from lmkv import wire
from lmkv.errors import CompatError
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.vllm.contents import config_digest
from lmkv.vllm.fingerprint import compare


def engine(
    role: str = "prefill",
    must: dict[str, str] | None = None,
    layout: dict[str, str] | None = None,
    protocol: int = wire.PROTOCOL,
) -> wire.EngineCard:
    fields = {"model": "m", "weights": "w", "dtype": "bf16"} | (must or {})
    places = {"block_tokens": "128", "tp": "1"} | (layout or {})
    name, incarnation = EngineName("e"), Incarnation("i")
    return wire.EngineCard(name, incarnation, "tcp://h:1", role, fields, places, (128,), (), protocol)


def test_equal_engines_of_opposite_roles_pair() -> None:
    compare(engine("prefill"), engine("decode"))
    compare(engine("both"), engine("both"))
    compare(engine("both"), engine("prefill"))


@pytest.mark.parametrize(
    ("theirs", "field", "hint"),
    [
        (engine("decode", must={"weights": "x"}), "weights", "same weight files"),
        (engine("decode", must={"model": "x", "dtype": "fp32"}), "model", "same model"),
        (engine("decode", must={"dtype": "fp32"}), "dtype", "--dtype"),
        (engine("decode", must={"new": "x"}), "new", "cannot be exchanged"),
        (engine("decode", layout={"tp": "2"}), "tp", "--tensor-parallel-size"),
        (engine("decode", layout={"block_tokens": "64"}), "block_tokens", "--block-size"),
        (engine("prefill"), "role", "one prefill and one decode"),
        (engine("decode", protocol=1), "protocol", "one lmkv version"),
    ],
)
def test_a_difference_is_refused_by_name(theirs: wire.EngineCard, field: str, hint: str) -> None:
    with pytest.raises(CompatError, match=hint) as caught:
        compare(engine("prefill"), theirs)
    assert caught.value.field == field and repr(field) in str(caught.value) and "tcp://h:1" in str(caught.value)


def test_config_digest_ignores_where_it_was_read_from() -> None:
    assert config_digest({"a": 1, "_name_or_path": "x"}) == config_digest({"_name_or_path": "y", "a": 1})
    assert config_digest({"a": 1}) != config_digest({"a": 2})


# --- times and checksums ---


def timed(role: str, times: wire.Times, checked_ppm: int = 1_000_000, checksum: str = "xxh3-64") -> wire.EngineCard:
    worker = wire.WorkerCard(
        Rank(0), "tcp://h:2", "inproc", b"", "DRAM", (), 1, 64, checked_ppm=checked_ppm, checksum=checksum
    )
    return wire.EngineCard(
        EngineName(role), Incarnation(role), "tcp://h:1", role, {}, {}, (16,), (worker,), times=times
    )


def test_beats_must_come_within_the_lease_of_the_other() -> None:
    slow, hasty = timed("prefill", wire.Times(beat_s=6)), timed("decode", wire.Times(lease_s=10))
    for pair in ((slow, hasty), (hasty, slow)):
        with pytest.raises(CompatError) as refused:
            compare(*pair)
        assert refused.value.field == "beat_s" and "lease_s" in str(refused.value)
    compare(timed("prefill", wire.Times(beat_s=5)), hasty)


def test_an_unchecked_decode_must_have_given_up_before_prefill_does() -> None:
    prefill = timed("prefill", wire.Times(lease_s=10, hold_s=20))
    with pytest.raises(CompatError) as refused:
        compare(prefill, timed("decode", wire.Times(deadline_s=31), checked_ppm=50_000))
    assert refused.value.field == "deadline_s" and "hold_s" in str(refused.value)
    compare(prefill, timed("decode", wire.Times(deadline_s=30), checked_ppm=50_000))
    compare(prefill, timed("decode", wire.Times(deadline_s=31)))


@pytest.mark.parametrize("theirs", ["", "another"])
def test_what_decode_demands_prefill_must_be_able_to_compute(theirs: str) -> None:
    prefill = timed("prefill", wire.Times(), checksum=theirs)
    with pytest.raises(CompatError) as refused:
        compare(prefill, timed("decode", wire.Times()))
    assert refused.value.field == "kv_verify"
    compare(prefill, timed("decode", wire.Times(), checked_ppm=0))
    compare(timed("prefill", wire.Times()), timed("decode", wire.Times(), checked_ppm=0, checksum=""))
