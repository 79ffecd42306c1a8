"""Settings of the router. Precedence: command line > `LMKV_ROUTER_*` > default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from lmkv.errors import ConfigError
from lmkv.settings import CommandSettings, refuse_unknown, split_list, wrong_value

from .policy import PolicyName

ENV_PREFIX = "LMKV_ROUTER_"


class RouterSettings(CommandSettings):
    """Times in seconds. Lists come from the environment separated by commas."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    prefill: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="prefill engine http://HOST:PORT, or http://HOST:PORT=tcp://HOST:PORT with its control address"
    )
    decode: Annotated[tuple[str, ...], NoDecode] = Field((), description="decode engine, written as for prefill")
    policy: PolicyName = Field("least-loaded", description="how engines are chosen")
    prefill_policy: PolicyName | None = Field(None, description="for prefill engines only; default is policy")
    decode_policy: PolicyName | None = Field(None, description="for decode engines only; default is policy")

    api_key: SecretStr | None = Field(None, description="clients have to send this Bearer token")
    engine_api_key: SecretStr | None = Field(None, description="Bearer token for the engines; needs api_key")

    retries: int = Field(2, ge=0, le=10, description="further attempts of a request that has no token yet")
    first_token_timeout_s: float = Field(120.0, gt=0, description="deadline of a stream's first token, an attempt")
    idle_timeout_s: float = Field(
        120.0, gt=0, description="longest pause of a stream after its first token, and time for a request's body"
    )
    response_timeout_s: float = Field(1800.0, gt=0, description="deadline of an answer that is not streamed")
    connect_timeout_s: float = Field(5.0, gt=0, description="deadline of a connection to an engine")
    drain_s: float = Field(30.0, ge=0, description="requests in flight get this long when the router is told to stop")
    max_body_bytes: int = Field(256 << 20, ge=1, description="larger request bodies are refused")

    health_interval_s: float = Field(1.0, gt=0, description="each engine's /health is polled this often")
    health_timeout_s: float = Field(2.0, gt=0, description="deadline of one poll")
    health_backoff_s: float = Field(5.0, gt=0, description="a dead engine is polled at least this often")
    control_interval_s: float = Field(2.0, gt=0, description="each engine is asked for its incarnation this often")
    meet_timeout_s: float = Field(30.0, gt=0, description="deadline of pairing two engines")
    explain_timeout_s: float = Field(2.0, gt=0, description="/explain waits this long for the engines' ledgers")
    ledger_requests: int = Field(4096, ge=1, description="so many requests can be explained")

    shadow_share: float = Field(
        0.0, ge=0, le=1, description="this share of the requests whose KV was loaded is computed again and compared"
    )
    shadow_tolerance: float | None = Field(
        None, gt=0, description="a logprob may differ by this much; by default it depends on the engine's dtype"
    )
    shadow_at_once: int = Field(1, ge=1, description="so many comparisons run at the same time")
    shadow_busy_requests: int = Field(
        4, ge=1, description="no comparison while so many requests are in flight at the decode engine"
    )
    shadow_timeout_s: float = Field(60.0, gt=0, description="deadline of one comparison")

    @field_validator("prefill", "decode", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_list(value)


def router_settings(given: Mapping[str, Any], environ: Mapping[str, str]) -> RouterSettings:
    """`given`: what stood on the command line. Raises ConfigError naming the setting, its value and what to do."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in RouterSettings.model_fields}
    refuse_unknown(environ, ENV_PREFIX, known, "the router", "lmkv router", "LMKV-C102")
    try:
        settings = RouterSettings(**given)
    except ValidationError as error:
        raise wrong_value(error, ENV_PREFIX) from error
    if settings.engine_api_key is not None and settings.api_key is None:
        raise ConfigError(
            "engine_api_key is set but api_key is not: clients' own keys would be replaced without being checked",
            hint="set --api-key too, or leave both out to pass the clients' keys on",
        )
    return settings
