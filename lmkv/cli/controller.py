"""`lmkv controller`"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def controller(
    listen: Annotated[str, typer.Option(help="Address to listen on; port 0 picks a free one.")] = (
        "tcp://127.0.0.1:18400"
    ),
    name: Annotated[str, typer.Option(help="What it calls itself.")] = "controller",
    lease_s: Annotated[float, typer.Option(help="A node that is silent for so long is DEGRADED.")] = 3.0,
    forget_s: Annotated[float, typer.Option(help="And after this it is forgotten, with its pages.")] = 30.0,
    replicate: Annotated[int, typer.Option(help="Nodes that hot pages should lie at; 0 or 1 copies nothing.")] = 0,
    replicate_heat: Annotated[float, typer.Option(help="Lookups within about a minute that make a page hot.")] = 20.0,
    etcd: Annotated[str, typer.Option(help="http://HOST:2379 of etcd's members, separated by commas.")] = "",
    etcd_prefix: Annotated[str, typer.Option(help="Nodes register under this key.")] = "/lmkv/nodes",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Keep a view of which pool node holds which page, and answer who asks. Run several for more than one to ask."""
    import logging
    import resource
    import signal

    from lmkv.control.controller import Controller, ControllerSettings
    from lmkv.control.follow import ViewSettings
    from lmkv.control.replication import ReplicationSettings
    from lmkv.errors import ConfigError

    try:
        level = logging.getLevelNamesMapping().get(log_level.upper())
        if level is None:
            raise ConfigError(f"--log-level {log_level!r} is unknown", hint="use debug, info, warning or error")
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        view = ViewSettings(lease_s=lease_s, forget_s=forget_s)
        replication = ReplicationSettings(copies=max(1, replicate), heat=replicate_heat)
        served = Controller(ControllerSettings(listen, name, view, replication, etcd, etcd_prefix))
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    # Each node takes two connections or three; the soft limit is often 1,024.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: served.stop())
    typer.echo(json.dumps({"ready": served.address}) if as_json else f"lmkv controller ready at {served.address}")
    try:
        served.run()
    finally:
        served.close()
