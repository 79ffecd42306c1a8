"""`lmkv bury`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._admin import JSON_HELP, explained, finish


def bury(
    incarnation: Annotated[str, typer.Argument(help="The engine that is gone, as `lmkv status --engine` names it.")],
    engine: Annotated[list[str], typer.Option(help="Control address of an engine that is to know; repeatable.")],
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Tell engines that another engine's processes have ended for certain, as when its machine is off.

    What it may have been writing to is used again 150 s later (0.25 s for one of the same host). Without that word it
    is after `quarantine_s`. Do not say it of an engine that is only cut off: it may still write.
    """
    import asyncio

    from lmkv.control.client import ControlClient, ControlError

    async def ask() -> list[dict[str, Any]]:
        client = ControlClient()
        try:
            return [await tell(client, address) for address in engine]
        finally:
            await client.close()

    async def tell(client: ControlClient, address: str) -> dict[str, Any]:
        try:
            said = await client.bury(address, incarnation)
        except ControlError as error:
            return {"address": address, "error": str(error)}
        return {"address": address, "error": f"{address}: {said.refused}"} if said.refused else {"address": address}

    with explained():
        finish(asyncio.run(ask()), as_json, lambda answer: f"{answer['address']}: {incarnation} is taken for gone")
