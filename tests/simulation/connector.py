"""The connector of simulated engines: lmkv's own, in the runtime of the engine that is being made."""

from __future__ import annotations

from lmkv.vllm.connector import LmkvConnector


class SimConnector(LmkvConnector):
    """`runtime` is set before each engine is made (tests/simulation/engine.py)."""
