"""`lmkv version`"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print the version of lmkv and of the messages its processes exchange."""
    import lmkv
    from lmkv.wire import PROTOCOL

    facts = {"version": lmkv.__version__, "protocol": PROTOCOL}
    typer.echo(json.dumps(facts) if as_json else f"lmkv {lmkv.__version__}, protocol {PROTOCOL}")
