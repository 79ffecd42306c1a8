"""Named points at which a test may kill the process; nothing happens at them otherwise.

`LMKV_POOL_KILL_AT=name:n` in the environment of a node kills it (SIGKILL) when it comes to the point `name` for the
n-th time. `POINTS` lists them all, so that a test can visit each.
"""

from __future__ import annotations

import os
import signal

from lmkv.errors import ConfigError

VARIABLE = "LMKV_POOL_KILL_AT"

POINTS = (
    "reserve:allocated",
    "commit:before",
    "commit:visible",
    "spill:before_write",
    "spill:half_written",
    "spill:written",
    "spill:synced",
    "spill:indexed",
    "promote:before_read",
    "promote:read",
    "promote:visible",
    "compact:before",
    "compact:half_copied",
    "compact:copied",
    "compact:switched",
    "drop:before",
    "drop:unindexed",
    "object:before_put",
    "object:put",
)

_armed = ""
_left = 0


def arm(setting: str) -> None:
    """`name:n`, or "" for nothing. Raises ConfigError for what is no point."""
    global _armed, _left
    name, _, count = setting.rpartition(":")
    if setting and (name not in POINTS or not count.isdigit() or int(count) < 1):
        raise ConfigError(f"{VARIABLE}={setting!r} is not POINT:COUNT", hint=f"points: {', '.join(POINTS)}")
    _armed, _left = name, int(count) if setting else 0


def armed(name: str) -> bool:
    """Whether `name` may kill: a step that has no inside of its own is then done in two."""
    return name == _armed


def point(name: str) -> None:
    """Here. Any thread."""
    global _left
    if name != _armed:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
