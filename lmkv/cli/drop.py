"""`lmkv drop`"""

from __future__ import annotations

from typing import Annotated

import typer

from ._admin import CONTROLLER_HELP, JSON_HELP, NODE_HELP, Addresses, each_node, explained, finish, from_hex


def drop(
    node: Annotated[Addresses, typer.Option(help=NODE_HELP)] = None,
    controller: Annotated[Addresses, typer.Option(help=CONTROLLER_HELP + " All its nodes are told.")] = None,
    namespace: Annotated[str, typer.Option(help="This namespace (32 hex digits); none: everything.")] = "",
    key: Annotated[Addresses, typer.Option(help="Only this page of it (34 hex digits); repeatable.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it, even if that is everything.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Make nodes forget pages, in all their tiers."""
    from lmkv.errors import ConfigError

    with explained():
        if not namespace and not yes:
            raise ConfigError("this would drop every page", hint="name a --namespace, or say --yes")
        if key and not namespace:
            raise ConfigError("--key without --namespace names no page", hint="give the --namespace it belongs to")
        where = from_hex("--namespace", namespace, 16) if namespace else b""
        which = b"".join(from_hex("--key", text, 17) for text in key or ())
        found = each_node(controller, node, lambda admin: {"dropped": admin.drop(where, which).pages})
    finish(found, as_json, lambda answer: f"{answer['address']}: {answer['dropped']} pages dropped")
