"""Every metric's name, help and labels in one table, from which collectors and the documentation are made."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True, slots=True)
class Spec:
    """`name` as prometheus-client takes it: a counter is exposed with `_total` added."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


TABLE = (
    Spec("lmkv_router_requests", "Requests answered, by endpoint, mode (pd, aggregated, none) and status.",
         ("endpoint", "mode", "status")),
    Spec("lmkv_router_aggregated", "Requests one engine did alone, by the reason.", ("reason",)),
    Spec("lmkv_router_retries", "Attempts that failed before their first token, by decode engine and reason.",
         ("engine", "reason")),
    Spec("lmkv_router_prefill_failures", "Prefill requests that failed; decode computed instead.",
         ("engine", "reason")),
    Spec("lmkv_router_stream_breaks", "Streams that broke after their first byte, by decode engine and reason.",
         ("engine", "reason")),
    Spec("lmkv_router_client_aborts", "Clients that went away, before or after the first byte.", ("when",)),
    Spec("lmkv_router_first_byte_seconds", "From a request's arrival to its first byte to the client.",
         ("endpoint",), _SECONDS),
    Spec("lmkv_router_prefill_seconds", "From dispatch to the answer of a prefill engine.", ("engine",), _SECONDS),
    Spec("lmkv_router_shadow", "Requests drawn for computing their loaded KV again, by result: equal, different, or "
         "skipped_ and why.", ("result",)),
    Spec("lmkv_router_in_flight", "Requests being served now."),
    Spec("lmkv_router_engine_up", "1 while the engine is healthy.", ("side", "engine")),
    Spec("lmkv_router_engine_requests", "Requests of this router in flight at an engine.", ("side", "engine")),
    Spec("lmkv_router_pair_ready", "1 while the pair is introduced and warm.", ("prefill", "decode")),
)  # fmt: skip

_by_name = {spec.name: spec for spec in TABLE}


def counter(name: str, registry: CollectorRegistry) -> Counter:
    """The collector of a table row; so for `gauge` and `histogram`. KeyError for a name that is not in the table."""
    spec = _by_name[name]
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


def gauge(name: str, registry: CollectorRegistry) -> Gauge:
    spec = _by_name[name]
    return Gauge(spec.name, spec.help, spec.labels, registry=registry)


def histogram(name: str, registry: CollectorRegistry) -> Histogram:
    spec = _by_name[name]
    return Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=registry)
