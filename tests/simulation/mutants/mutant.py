"""What a mutant is. Its text is looked up, so that it stays true while code moves; it must be there once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HALVES = ("scheduler", "worker", "pool")


class MutantError(Exception):
    """The text of a mutant is not in the tree, or not once: code has moved on, and the mutant has to follow it."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file`, the text `before` becomes `after`. `bug` says what that is."""

    name: str
    half: str
    """One of `HALVES`."""
    bug: str
    file: str
    before: str
    after: str
    needs: str = ""
    """Only worlds with all of these are run: "pool", "unlike", "faults", "async", "async prefill", joined by ", "."""

    def apply(self, root: Path) -> str:
        """The file's new text. Raises MutantError."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        found = text.count(self.before)
        if found != 1:
            raise MutantError(
                f"mutant {self.name}: its text is {found} times in {self.file}, not once; "
                f"write tests/simulation/mutants/table.py anew for it:\n{self.before}"
            )
        return text.replace(self.before, self.after)
