"""Asks the router whether it can serve."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any


def get_json(url: str) -> dict[str, Any]:
    """Raises OSError or ValueError. A 503 with a body is an answer too."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


def router_ready(url: str) -> str:
    """ "" when all its engines are healthy and their pairs made; else what is missing."""
    try:
        told = get_json(f"{url}/readyz")
    except (OSError, ValueError) as error:
        return f"the router ({error})"
    if not told.get("ready"):
        return "; ".join(told.get("reasons") or ["the router"])
    down = [engine["name"] for engine in told.get("engines") or [] if not engine.get("healthy", True)]
    unpaired = [pair for pair in told.get("pairs") or [] if pair.get("state") != "ready"]
    if down or unpaired:
        return "; ".join(told.get("warnings") or []) or "the engines to pair"
    return ""
