#!/usr/bin/env python3
"""Writes the tables of the docs that come from the code: settings, error codes. `--check` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lmkv import errors
from lmkv.config import ConnectorSettings

DOCS = Path(__file__).resolve().parent.parent / "docs"


def settings_table() -> str:
    lines = ["| setting | variable | default | meaning |", "|---|---|---|---|"]
    for name, field in ConnectorSettings.model_fields.items():
        default = field.default if field.default not in ("", ()) else "–"
        lines.append(f"| `{name}` | `LMKV_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


def errors_table() -> str:
    lines = ["| code | error | meaning |", "|---|---|---|"]
    meanings = _meanings()
    for error in sorted(_family(errors.LmkvError), key=lambda c: (c.code, c.__name__)):
        said = meanings.get(error.__name__) or (error.__doc__ or "any error of lmkv").strip().splitlines()[0]
        lines.append(f"| `{error.code}` | `{error.__name__}` | {said} |")
    return "\n".join(lines)


def _family(error: type[errors.LmkvError]) -> set[type[errors.LmkvError]]:
    """The class and all its subclasses, of the modules that define errors of their own too."""
    import lmkv.control.client
    import lmkv.router.replies  # noqa: F401

    return {error}.union(*(_family(child) for child in error.__subclasses__()))


def _meanings() -> dict[str, str]:
    """From the tree drawn in the docstring of errors.py."""
    found = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", " ").replace("└──", " ").split()
        if len(words) > 2 and hasattr(errors, words[0]):
            found[words[0]] = " ".join(words[2:])
    return found


TABLES = {"connector.md": ("settings", settings_table), "errors.md": ("errors", errors_table)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say which file is stale, change nothing")
    check = parser.parse_args().check
    stale = []
    for name, (mark, table) in TABLES.items():
        path = DOCS / name
        text = path.read_text()
        head, rest = text.split(f"<!-- {mark} -->\n", 1)
        tail = rest.split(f"<!-- /{mark} -->", 1)[1]
        fresh = f"{head}<!-- {mark} -->\n{table()}\n<!-- /{mark} -->{tail}"
        if fresh != text:
            stale.append(name)
            if not check:
                path.write_text(fresh)
    if check and stale:
        print(f"stale: {', '.join(stale)} · run scripts/docs_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
