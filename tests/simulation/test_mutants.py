"""Each mutant fits today's tree: what it changes is there once, and what it makes of it can be compiled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.mutants.mutant import HALVES, Mutant, MutantError
from tests.simulation.mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_tree(mutant: Mutant) -> None:
    text = mutant.apply(ROOT)
    assert text != (ROOT / mutant.file).read_text()
    compile(text, mutant.file, "exec")


def test_each_half_of_lmkv_has_its_mutants() -> None:
    halves = Counter(mutant.half for mutant in MUTANTS)
    assert set(halves) == set(HALVES) and min(halves.values()) >= 3
    assert len(MUTANTS) >= 12
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_text_that_is_gone_is_told_by_the_mutants_name(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text("a = 1\n")
    mutant = Mutant("lost", "pool", "", "some.py", "b = 1", "b = 2")
    with pytest.raises(MutantError, match=r"mutant lost: its text is 0 times in some\.py"):
        mutant.apply(tmp_path)
