"""`lmkv drain`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._admin import JSON_HELP, Addresses, each_node, explained, finish


def drain(
    node: Annotated[Addresses, typer.Option(help="The node's address; repeatable.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the node when that is done.")] = False,
    deadline_s: Annotated[float, typer.Option(min=0.1, help="Wait so long.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Let a node take nothing new, and write what only its memory holds to its lower tiers."""

    def ask(admin: Any) -> dict[str, Any]:
        return {"volatile": admin.drain(stop=stop, deadline_s=deadline_s).volatile}

    with explained():
        if not node:
            from lmkv.errors import ConfigError

            raise ConfigError("no node is given", hint="name it: --node tcp://HOST:PORT (lmkv status lists them)")
        found = each_node(None, node, ask)
    finish(found, as_json, _text)


def _text(answer: dict[str, Any]) -> str:
    left = answer["volatile"]
    return f"{answer['address']} is drained" + (f"; {left} pages are in its memory only" if left else "")
