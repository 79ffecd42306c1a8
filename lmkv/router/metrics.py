"""Metrics of the router, made from its part of the table in lmkv.obs.metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from lmkv.obs.metrics import counter, gauge, histogram


class RouterMetrics:
    """One set a router, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = counter("lmkv_router_requests", self.registry)
        self.aggregated = counter("lmkv_router_aggregated", self.registry)
        self.retries = counter("lmkv_router_retries", self.registry)
        self.prefill_failures = counter("lmkv_router_prefill_failures", self.registry)
        self.stream_breaks = counter("lmkv_router_stream_breaks", self.registry)
        self.client_aborts = counter("lmkv_router_client_aborts", self.registry)
        self.first_byte_s = histogram("lmkv_router_first_byte_seconds", self.registry)
        self.prefill_s = histogram("lmkv_router_prefill_seconds", self.registry)
        self.shadow = counter("lmkv_router_shadow", self.registry)
        self.in_flight = gauge("lmkv_router_in_flight", self.registry)
        self.engine_up = gauge("lmkv_router_engine_up", self.registry)
        self.engine_requests = gauge("lmkv_router_engine_requests", self.registry)
        self.pair_ready = gauge("lmkv_router_pair_ready", self.registry)
