"""The `lmkv` command. One file a command; what a command needs is imported inside it, so that --help is quick."""

from __future__ import annotations

import typer

from .bury import bury
from .controller import controller
from .doctor import doctor
from .drain import drain
from .drop import drop
from .keys import keys
from .pool import pool
from .router import router
from .status import status
from .up import up
from .version import version

main = typer.Typer(
    name="lmkv",
    help="Disaggregated LLM serving for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
main.command()(up)
main.command()(router)
main.command()(pool)
main.command()(controller)
main.command()(status)
main.command()(keys)
main.command()(drain)
main.command()(drop)
main.command()(bury)
main.command()(doctor)
main.command()(version)

__all__ = ["main"]
