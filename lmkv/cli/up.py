"""`lmkv up`"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from lmkv.up.plan import Options, Plan

# typer reads these annotations at run time and shows `Optional` as no value; None means: not given here.
_Text = Optional[str]  # noqa: UP045
_Int = Optional[int]  # noqa: UP045
_List = Optional[list[str]]  # noqa: UP045


def up(
    model: Annotated[str, typer.Option(help="Folder of the model, or its name on the hub.")],
    vllm: Annotated[_List, typer.Argument(metavar="-- VLLM_OPTIONS", help="Options of vLLM for each engine.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the router; 0 picks a free one.")] = 8000,
    prefill: Annotated[_Int, typer.Option(min=1, help="Number of prefill engines. [1]")] = None,
    decode: Annotated[_Int, typer.Option(min=1, help="Number of decode engines. [1]")] = None,
    engines: Annotated[
        _Int, typer.Option(min=1, help="Instead of those: engines that compute and decode, joined by the pool alone.")
    ] = None,
    pool: Annotated[bool, typer.Option("--pool/--no-pool", help="Share KV through a pool node.")] = True,
    pool_capacity: Annotated[_Text, typer.Option(help="Memory of the pool node. [2GiB]")] = None,
    disk: Annotated[_Text, typer.Option(help="Directory of the pool's disk tier; without it there is none.")] = None,
    cores: Annotated[
        _List, typer.Option(help="CPU cores of an engine, 0-3; once for each, prefill first. [spread]")
    ] = None,
    run: Annotated[str, typer.Option(help="Folder for logs.")] = ".lmkv",
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Run everything on this machine: a controller, a pool node, prefill and decode engines, and the router.

    Progress goes to stderr, one line to stdout when all is ready. Ctrl-C ends everything.
    """
    from pathlib import Path

    from lmkv.errors import ConfigError
    from lmkv.up.plan import Options

    try:
        if engines and (prefill or decode):
            raise ConfigError("--engines stands beside --prefill or --decode", hint="leave one of them out")
        options = Options(
            model=model,
            run=Path(run),
            port=port,
            prefill=prefill or 1,
            decode=decode or 1,
            engines=engines or 0,
            pool=pool,
            pool_capacity=pool_capacity or "",
            disk=disk or "",
            cores=tuple(cores or ()),
            vllm=tuple(vllm or ()),
        )
        status = _run(options, as_json)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


def _run(options: Options, as_json: bool) -> int:
    """Raises ConfigError."""
    from lmkv.up.children import ChildError
    from lmkv.up.machine import Machine
    from lmkv.up.plan import make_plan

    plan = make_plan(options)

    def announce() -> None:
        typer.echo(json.dumps(_told(plan, options)) if as_json else f"lmkv up ready at {plan.url}")
        typer.echo(f"model {plan.model} · logs in {options.run} · Ctrl-C ends everything", err=True)

    try:
        return Machine(plan, options.run, announce).run()
    except ChildError as error:
        typer.echo(f"lmkv up: {error}", err=True)
        return 1


def _told(plan: Plan, options: Options) -> dict[str, object]:
    return {
        "ready": plan.url,
        "model": plan.model,
        "engines": [{"name": e.name, "url": e.address, "control": e.control} for e in plan.engines],
        "pool": [process.address for process in plan.pool],
        "controller": [process.address for process in plan.controller],
        "logs": str(options.run.resolve()),
    }
