"""`lmkv keys`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._admin import CONTROLLER_HELP, JSON_HELP, NODE_HELP, Addresses, each_node, explained, finish, from_hex

_PART = 4096


def keys(
    node: Annotated[Addresses, typer.Option(help=NODE_HELP)] = None,
    controller: Annotated[Addresses, typer.Option(help=CONTROLLER_HELP + " Its nodes are asked.")] = None,
    namespace: Annotated[str, typer.Option(help="Only of this namespace (32 hex digits).")] = "",
    limit: Annotated[int, typer.Option(min=1, help="So many of each node at most.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List the pages that nodes hold: namespace, chunk key, group, tiers."""
    with explained():
        wanted = from_hex("--namespace", namespace, 16) if namespace else b""
        found = each_node(controller, node, lambda admin: {"keys": _list(admin, wanted, limit)})
    finish(found, as_json, _text)


def _list(admin: Any, namespace: bytes, limit: int) -> list[dict[str, Any]]:
    from lmkv.control.admin import AdminError
    from lmkv.poolwire import EVENT_BYTES, OBJECT_KEY_BYTES, Tier, split_keys

    found: list[dict[str, Any]] = []
    after, more = b"", True
    while more and len(found) < limit:
        answer = admin.list_keys(namespace, after, min(_PART, limit - len(found)))
        records = split_keys(answer.records, EVENT_BYTES)
        if answer.more and (not records or records[-1][:OBJECT_KEY_BYTES] <= after):
            raise AdminError(f"{admin.address} lists keys without coming forward", hint="report this with its version")
        for record in records:
            tiers = [tier.name for tier in Tier if tier & record[-1]]
            page = {"namespace": record[:16].hex(), "chunk": record[16:32].hex(), "group": record[32], "tiers": tiers}
            found.append(page)
            after = record[:OBJECT_KEY_BYTES]
        more = answer.more
    return found


def _text(answer: dict[str, Any]) -> str:
    lines = [f"{answer['address']}: {len(answer['keys'])} pages"]
    lines += [f"  {k['namespace']} {k['chunk']} {k['group']:3}  {'+'.join(k['tiers'])}" for k in answer["keys"]]
    return "\n".join(lines)
