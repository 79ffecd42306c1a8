"""`lmkv router`"""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer

# typer reads these annotations at run time and shows `Optional` as no value; None means: not given here.
_Text = Optional[str]  # noqa: UP045
_Int = Optional[int]  # noqa: UP045
_Float = Optional[float]  # noqa: UP045
_List = Optional[list[str]]  # noqa: UP045
_ENGINE = "http://HOST:PORT, or http://HOST:PORT=tcp://HOST:PORT with its control address; repeatable"


def router(
    prefill: Annotated[_List, typer.Option(help=f"Prefill engine: {_ENGINE}.")] = None,
    decode: Annotated[_List, typer.Option(help=f"Decode engine: {_ENGINE}.")] = None,
    host: Annotated[_Text, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[_Int, typer.Option(help="Port to listen on; 0 picks a free one. [8000]")] = None,
    policy: Annotated[_Text, typer.Option(help="round-robin or least-loaded. [least-loaded]")] = None,
    prefill_policy: Annotated[_Text, typer.Option(help="Policy for prefill engines only.")] = None,
    decode_policy: Annotated[_Text, typer.Option(help="Policy for decode engines only.")] = None,
    api_key: Annotated[_Text, typer.Option(help="Clients have to send this Bearer token.")] = None,
    engine_api_key: Annotated[_Text, typer.Option(help="Bearer token for the engines; needs --api-key.")] = None,
    retries: Annotated[_Int, typer.Option(help="Further attempts before the first token. [2]")] = None,
    first_token_timeout_s: Annotated[_Float, typer.Option(help="Deadline of a first token. [120]")] = None,
    idle_timeout_s: Annotated[_Float, typer.Option(help="Longest pause of a stream. [120]")] = None,
    response_timeout_s: Annotated[_Float, typer.Option(help="Deadline of an unstreamed answer. [1800]")] = None,
    connect_timeout_s: Annotated[_Float, typer.Option(help="Deadline of a connection. [5]")] = None,
    drain_s: Annotated[_Float, typer.Option(help="Time for requests in flight on SIGTERM. [30]")] = None,
    max_body_bytes: Annotated[_Int, typer.Option(help="Largest request body. [268435456]")] = None,
    health_interval_s: Annotated[_Float, typer.Option(help="Pause between polls of an engine. [1]")] = None,
    control_interval_s: Annotated[_Float, typer.Option(help="Pause between control questions. [2]")] = None,
    meet_timeout_s: Annotated[_Float, typer.Option(help="Deadline of pairing two engines. [30]")] = None,
    ledger_requests: Annotated[_Int, typer.Option(help="So many requests can be explained. [4096]")] = None,
    shadow_share: Annotated[
        _Float, typer.Option(help="Share of requests with loaded KV to compute again and compare, 0 to 1. [0]")
    ] = None,
    shadow_tolerance: Annotated[
        _Float, typer.Option(help="A logprob may differ by this much. [by the engine's dtype]")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Serve the OpenAI API in front of prefill and decode engines.

    Every option can also be set as LMKV_ROUTER_NAME in the environment; lists are then separated by commas.
    """
    given = {name: value for name, value in locals().items() if value not in (None, [])}
    del given["log_level"], given["as_json"]
    run(given, log_level, as_json)


def run(given: dict[str, Any], log_level: str, as_json: bool) -> None:
    """Exit status 2 for what the operator has to correct, 0 after a clean stop."""
    import logging
    import os

    from lmkv.errors import ConfigError
    from lmkv.router.serve import serve
    from lmkv.router.settings import router_settings

    def announce(url: str) -> None:
        typer.echo(json.dumps({"ready": url}) if as_json else f"lmkv router ready at {url}")

    try:
        level = logging.getLevelNamesMapping().get(log_level.upper())
        if level is None:
            raise ConfigError(f"--log-level {log_level!r} is unknown", hint="use debug, info, warning or error")
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        serve(router_settings(given, os.environ), announce)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
