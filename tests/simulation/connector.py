"""The connector of simulated engines: lmkv's own, with the world's runtime."""

from __future__ import annotations

from lmkv.vllm.connector import LmkvConnector


class SimConnector(LmkvConnector):
    pass
