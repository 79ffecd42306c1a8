#!/usr/bin/env python3
"""The router: the same as `lmkv router`."""

import typer

from lmkv.cli.router import router

if __name__ == "__main__":
    typer.run(router)
