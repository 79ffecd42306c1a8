"""`lmkv pool`"""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer

# typer reads these annotations at run time and shows `Optional` as no value; None means: not given here.
_Text = Optional[str]  # noqa: UP045
_Int = Optional[int]  # noqa: UP045
_Float = Optional[float]  # noqa: UP045
_Bool = Optional[bool]  # noqa: UP045
_List = Optional[list[str]]  # noqa: UP045


def pool(
    listen: Annotated[_Text, typer.Option(help="Control address. [tcp://127.0.0.1:18300]")] = None,
    advertise: Annotated[_Text, typer.Option(help="Host that others use, for 0.0.0.0 and NAT.")] = None,
    name: Annotated[_Text, typer.Option(help="Name in logs and listings. [pool-HOST-PORT]")] = None,
    capacity: Annotated[_Text, typer.Option(help="Memory for pages. [2GiB]")] = None,
    huge: Annotated[_Bool, typer.Option("--huge/--no-huge", help="Use huge pages if there are enough. [huge]")] = None,
    prefault: Annotated[
        _Bool, typer.Option("--prefault/--no-prefault", help="Take the arena's memory at the start. [prefault]")
    ] = None,
    share: Annotated[_Text, typer.Option(help="Unix socket for processes of this host; none: off.")] = None,
    transport: Annotated[_Text, typer.Option(help="Data plane for other hosts; none: off. [nixl://]")] = None,
    policy: Annotated[_Text, typer.Option(help="lru or s3fifo. [lru]")] = None,
    disk: Annotated[_Text, typer.Option(help="Directory of the disk tier; without it there is none.")] = None,
    disk_capacity: Annotated[_Text, typer.Option(help="Size of the disk tier. [16GiB]")] = None,
    disk_segment: Annotated[_Text, typer.Option(help="Size of a file of the disk tier. [256MiB]")] = None,
    disk_admit_hits: Annotated[_Int, typer.Option(help="Hits before a page goes to disk. [0]")] = None,
    object: Annotated[
        _Text, typer.Option(help="URL of the object store, s3://BUCKET/PREFIX; without it, none.")
    ] = None,
    object_endpoint: Annotated[_Text, typer.Option(help="Endpoint of an S3-compatible server.")] = None,
    object_region: Annotated[_Text, typer.Option(help="Region of the bucket.")] = None,
    object_allow_http: Annotated[
        _Bool, typer.Option("--object-allow-http/--no-object-allow-http", help="An endpoint without TLS.")
    ] = None,
    object_admit_hits: Annotated[_Int, typer.Option(help="Hits before a page goes to the object store. [0]")] = None,
    key_file: Annotated[_Text, typer.Option(help="Key for encryption at rest; without it, none.")] = None,
    controller: Annotated[_List, typer.Option(help="Controller tcp://HOST:PORT; repeatable.")] = None,
    etcd: Annotated[_Text, typer.Option(help="etcd to register with, http://HOST:PORT.")] = None,
    etcd_prefix: Annotated[_Text, typer.Option(help="Keys in etcd begin so. [/lmkv/nodes]")] = None,
    replicas: Annotated[_List, typer.Option(help="Node that copies what is to have replicas; repeatable.")] = None,
    beat_s: Annotated[_Float, typer.Option(help="Interval of signs of life. [1]")] = None,
    drain_s: Annotated[_Float, typer.Option(help="On SIGTERM, time to write what only memory holds. [30]")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Run a pool node: memory, disk and object store for KV pages that any engine has computed.

    Every option, and a few more (see docs/pool.md), can also be set as LMKV_POOL_NAME in the environment.
    """
    given = {name: value for name, value in locals().items() if value not in (None, [])}
    del given["log_level"], given["as_json"]
    run(given, log_level, as_json)


def run(given: dict[str, Any], log_level: str, as_json: bool) -> None:
    """Exit status 2 for what the operator has to correct, 0 after a clean stop."""
    import logging
    import os

    from lmkv.errors import LmkvError
    from lmkv.pool.serve import serve
    from lmkv.pool.settings import node_settings
    from lmkv.poolwire import NodeCard

    def announce(card: NodeCard) -> None:
        told = {"ready": card.address, "name": card.name, "capacity_bytes": card.arena_bytes}
        typer.echo(json.dumps(told) if as_json else f"lmkv pool ready at {card.address}")

    try:
        level = logging.getLevelNamesMapping().get(log_level.upper())
        if level is None:
            typer.echo(f"--log-level {log_level!r} is unknown · use debug, info, warning or error", err=True)
            raise typer.Exit(2)
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        serve(node_settings(given, os.environ), os.environ, announce)
    except LmkvError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
