"""`lmkv status`"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ._admin import CONTROLLER_HELP, JSON_HELP, NODE_HELP, Addresses, addresses, explained, size, table


def status(
    controller: Annotated[Addresses, typer.Option(help=CONTROLLER_HELP + " [tcp://127.0.0.1:18400]")] = None,
    node: Annotated[Addresses, typer.Option(help=NODE_HELP)] = None,
    engine: Annotated[Addresses, typer.Option(help="An engine's control address; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """What controllers know of the pool's nodes, and what nodes and engines say of themselves.

    Exit status 1 if one is silent.
    """
    with explained():
        controllers, nodes = addresses(controller, node) if controller or node or not engine else ([], [])
        found = {
            "controllers": [_answer(address, _members) for address in controllers],
            "nodes": [_answer(address, _stats) for address in nodes],
            "engines": _engines(engine or []),
        }
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(found)
    if any("error" in answer for answers in found.values() for answer in answers):
        raise typer.Exit(1)


def _answer(address: str, ask: Any) -> dict[str, Any]:
    from lmkv.control.admin import Admin, AdminError

    try:
        with Admin(address) as admin:
            said: dict[str, Any] = ask(admin)
            return {"address": address} | said
    except AdminError as error:
        return {"address": address, "error": str(error)}


def _members(admin: Any) -> dict[str, Any]:
    members = admin.members()
    nodes = [
        {
            "name": member.card.name,
            "incarnation": member.card.incarnation,
            "address": member.card.address,
            "state": member.state,
            "pages": member.pages,
            "used_bytes": member.used_bytes,
            "capacity_bytes": member.capacity_bytes,
            "heard_s": round(member.heard_s, 3),
            "draining": member.draining,
        }
        for member in members.nodes
    ]
    return {"name": members.name, "nodes": nodes}


def _stats(admin: Any) -> dict[str, Any]:
    answer = admin.stats()
    card = answer.card
    return {"name": card.name, "incarnation": card.incarnation, "stats": json.loads(answer.stats)}


def _engines(asked: list[str]) -> list[dict[str, Any]]:
    import asyncio

    from lmkv.control.client import ControlClient, ControlError

    async def ask() -> list[dict[str, Any]]:
        client = ControlClient()
        try:
            return [await describe(client, address) for address in asked]
        finally:
            await client.close()

    async def describe(client: ControlClient, address: str) -> dict[str, Any]:
        try:
            said = await client.describe(address)
        except ControlError as error:
            return {"address": address, "error": str(error)}
        peers = [{"name": name, "incarnation": incarnation} for name, incarnation in said.peers]
        known = {"name": said.name, "incarnation": said.incarnation, "role": said.role}
        why = {"private": said.private, "trouble": said.trouble}
        return {"address": address, **known, **why, "peers": peers, "counters": said.counters}

    return asyncio.run(ask()) if asked else []


def _print(found: dict[str, list[dict[str, Any]]]) -> None:
    for answer in found["controllers"] + found["nodes"] + found["engines"]:
        if "error" in answer:
            typer.echo(answer["error"], err=True)
        elif "role" in answer:
            typer.echo(f"engine {answer['name']} ({answer['incarnation']}) at {answer['address']}: {answer['role']}")
            if answer["private"]:
                typer.echo(f"  private, exchanges KV with no other engine: {answer['private']}")
            if answer["trouble"]:
                typer.echo(f"  in trouble, restart it when it suits you: {answer['trouble']}")
            paired = ", ".join(peer["name"] for peer in answer["peers"]) or "none"
            typer.echo(table([("  peers", paired), *(("  " + k, str(v)) for k, v in answer["counters"].items())]))
        elif "nodes" in answer:
            typer.echo(f"controller {answer['name']} at {answer['address']}: {len(answer['nodes'])} nodes")
            if answer["nodes"]:
                typer.echo(table([_HEADING, *map(_row, answer["nodes"])]))
        else:
            typer.echo(f"node {answer['name']} ({answer['incarnation']}) at {answer['address']}")
            typer.echo(table([("  " + key, str(value)) for key, value in answer["stats"].items()]))


_HEADING = ("NODE", "INCARNATION", "ADDRESS", "STATE", "PAGES", "USED", "CAPACITY", "HEARD")


def _row(member: dict[str, Any]) -> tuple[str, ...]:
    state = member["state"] + (" draining" if member["draining"] else "")
    used, capacity = size(member["used_bytes"]), size(member["capacity_bytes"])
    heard = f"{member['heard_s']:.1f} s ago"
    where = (member["name"], member["incarnation"], member["address"])
    return (*where, state, str(member["pages"]), used, capacity, heard)
