#!/usr/bin/env python3
"""Healthcheck of a container: every argument has to be well. http://…: answers with 2xx; tcp://H:P: takes a connection;
anything else: a file that is there (an engine makes it when it is warm)."""

import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 3.0


def well(what: str) -> bool:
    try:
        if what.startswith("http://"):
            with urllib.request.urlopen(what, timeout=TIMEOUT_S) as answer:
                return bool(200 <= answer.status < 300)
        if what.startswith("tcp://"):
            host, _, port = what.removeprefix("tcp://").rpartition(":")
            with socket.create_connection((host, int(port)), TIMEOUT_S):
                return True
        return Path(what).exists()
    except (OSError, ValueError) as error:
        print(f"{what}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(0 if len(sys.argv) > 1 and all([well(what) for what in sys.argv[1:]]) else 1)
