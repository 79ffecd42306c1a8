"""What the commands that administer nodes and controllers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import typer

# typer reads these annotations at run time and shows `Optional` as no value.
Addresses = Optional[list[str]]  # noqa: UP045
CONTROLLER = "tcp://127.0.0.1:18400"
CONTROLLER_HELP = "A controller's address; repeatable."
NODE_HELP = "A node's address; repeatable."
JSON_HELP = "Print JSON."


@contextmanager
def explained() -> Iterator[None]:
    """Errors as one line: exit status 2 for what the operator has to correct, 1 for who does not answer."""
    from lmkv.errors import ConfigError, LmkvError

    try:
        yield
    except LmkvError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def addresses(controllers: Addresses, nodes: Addresses) -> tuple[list[str], list[str]]:
    """The controller of this host where nothing is given."""
    return controllers or ([] if nodes else [CONTROLLER]), nodes or []


def each_node(controllers: Addresses, nodes: Addresses, ask: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `ask` (given an Admin) says for each node; {"error": …} for one that does not answer. Raises LmkvError for
    a controller that does not."""
    from lmkv.control.admin import Admin, AdminError, nodes_of

    found = []
    for address in nodes_of(*addresses(controllers, nodes)):
        try:
            with Admin(address) as admin:
                found.append({"address": address} | ask(admin))
        except AdminError as error:
            found.append({"address": address, "error": str(error)})
    return found


def finish(found: Iterable[dict[str, Any]], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """Print each; exit status 1 if one has an error."""
    answers = list(found)
    failed = any("error" in answer for answer in answers)
    if as_json:
        typer.echo(json.dumps(answers, indent=1))
    else:
        for answer in answers:
            if "error" in answer:
                typer.echo(answer["error"], err=True)
            else:
                typer.echo(text(answer))
        if not answers:
            typer.echo("no nodes")
    if failed:
        raise typer.Exit(1)


def from_hex(option: str, text: str, size: int) -> bytes:
    """Raises ConfigError."""
    from lmkv.errors import ConfigError

    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != size:
        raise ConfigError(f"{option} {text!r} is not {size} bytes in hex", hint=f"give {2 * size} hex digits")
    return raw


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError(count)
