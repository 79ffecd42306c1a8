"""Settings of an engine's connector; the only reader of `LMKV_*` for engines.

Precedence: environment (`LMKV_LISTEN=…`) > `kv_connector_extra_config` (`{"listen": …}`) > default. An unknown name is
an error, unless it belongs to another process, a script or a build (`lmkv.settings`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from .addresses import check_host, check_reachable, checked
from .errors import ConfigError
from .settings import is_others


class ConnectorSettings(BaseSettings):
    """One engine. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="LMKV_", extra="forbid", frozen=True)

    listen: str = Field("tcp://127.0.0.1:0", description="control address of this engine; port 0 picks a free one")
    advertise: str = Field(
        "", description="host that peers use instead of the listen host (needed for 0.0.0.0 and NAT)"
    )
    worker_port: int = Field(0, ge=0, le=65535, description="control port of rank 0, rank r has +r; 0 picks free ones")
    name: str = Field("", description="name of this engine in logs and views; default is role, host and port")
    transport: str = Field("nixl://", description="data plane")
    peers: tuple[str, ...] = Field((), description="control addresses of engines to pair with at start")

    beat_s: float = Field(0.5, gt=0, description="interval of heartbeats between paired workers")
    lease_s: float = Field(10.0, gt=0, description="a silent peer's leases end after this")
    deadline_s: float = Field(120.0, gt=0, description="decode waits this long for one transfer, then computes itself")
    hold_s: float = Field(
        120.0, gt=0, description="prefill holds KV this long for a grant that does not come or a peer that is silent"
    )
    quarantine_s: float = Field(
        600.0,
        gt=0,
        description="blocks granted to a peer, or staging lent to a pool node, that is lost, neither answers nor is "
        "proven dead, are held this long; then the data plane is made anew",
    )
    pair_s: float = Field(10.0, gt=0, description="a request waits this long for a pairing, then computes itself")

    min_post_bytes: int = Field(
        4 << 20,
        ge=1,
        description="layers are grouped until a step's writes have this size; its first and a prompt's last less",
    )
    max_post_bytes: int = Field(16 << 20, ge=1, description="a write is not larger than this")
    max_inflight_bytes: int = Field(64 << 20, ge=1, description="window of posted, unfinished bytes per peer")
    landing_bytes: int = Field(
        64 << 20,
        ge=0,
        description="decode: memory for KV that arrives in another layout and is converted, of which one "
        "engine gets half at most; 0: none",
    )
    landing_slot_bytes: int = Field(2 << 20, ge=4096, description="decode: one write in another layout fits in a slot")
    convert_dtype: bool = Field(
        False, description="decode: take KV of another dtype and convert it (answers may differ from prefill's dtype)"
    )
    kv_verify: Literal["auto", "off", "sample", "full"] = Field(
        "auto",
        description="decode: which writes must carry a checksum that is verified on arrival; auto is full in host "
        "memory and sample in device memory",
    )
    kv_verify_share: float = Field(0.05, ge=0, le=1, description="kv_verify sample: this share of the writes")
    min_remote_tokens: int = Field(16, ge=1, description="fewer missing tokens than this are computed by decode itself")
    pool: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="control addresses of pool nodes to use, tcp://HOST:PORT; the host's own is found among them"
    )
    controller: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="controllers that tell of pool nodes and are asked who holds what"
    )
    tenant: str = Field("", description="engines share pool pages only with those of the same tenant")
    chunk_tokens: int = Field(128, ge=16, description="tokens of a pool page; engines share only with the same")
    pool_load: bool = Field(True, description="load KV from the pool")
    pool_store: bool = Field(True, description="store KV to the pool")
    lookup_ms: float = Field(2.0, gt=0, description="a lookup that takes longer is a miss")
    promote_s: float = Field(1.0, ge=0, description="a request waits this long for pages of a node's lower tiers")
    load_s: float = Field(10.0, gt=0, description="a load that takes longer is cut; the rest is computed")
    min_pool_tokens: int = Field(64, ge=1, description="fewer tokens than this are not loaded from the pool")
    remote_load: Literal["push", "read"] = Field(
        "push", description="pages of other hosts: push has the node write them (quicker over TCP), read reads them"
    )
    staging_bytes: int = Field(
        64 << 20, ge=1 << 20, description="memory for pages on their way from and to other hosts"
    )
    store_drain_s: float = Field(10.0, ge=0, description="an engine that ends waits this long for its stores")
    on_reset: Literal["new_epoch", "count", "external", "keep"] = Field(
        "new_epoch",
        description="after a reset of the prefix cache the weights may be others: new_epoch exchanges KV with no other "
        "engine any more; count only with engines that have been reset as often (never through the pool); external is "
        "new_epoch, but for resets of the external cache only (reset_external, pause, sleep); keep says that the "
        "weights stay the same",
    )
    debug_dump_dir: str = Field("", description="write the KV bytes of every transfer here, on both sides (tests)")
    log_level: Literal["debug", "info", "warning"] = Field("info", description="least level that is logged")

    @field_validator("pool", "controller", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = json.loads(value) if value.startswith("[") else value.split(",")
            return tuple(part.strip() for part in value if part.strip())
        return value

    @field_validator("pool", "controller", "peers")
    @classmethod
    def _addresses(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return tuple(checked(str(info.field_name), address) for address in value)

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        return checked("listen", value, listen=True)

    @field_validator("advertise")
    @classmethod
    def _advertise(cls, value: str) -> str:
        return check_host(value) if value else ""

    @model_validator(mode="after")
    def _reachable(self) -> ConnectorSettings:
        check_reachable(self.listen, self.advertise)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def connector_settings(extra_config: Mapping[str, Any], environ: Mapping[str, str]) -> ConnectorSettings:
    """Validated settings. Raises ConfigError naming the field, its value and the nearest known name."""
    known = set(ConnectorSettings.model_fields)
    for name in extra_config:
        if name not in known:
            raise _unknown("kv_connector_extra_config", name, known)
    for variable in environ:
        if variable.startswith("LMKV_") and not is_others(variable):
            name = variable.removeprefix("LMKV_").lower()
            if name not in known:
                raise _unknown("environment variable", variable, {f"LMKV_{k.upper()}" for k in known})
    try:
        return ConnectorSettings(**extra_config)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"setting {field!r} has the value {problem.get('input')!r}: {problem['msg']}",
            hint="correct it in kv_connector_extra_config or the environment",
        ) from error


def _unknown(where: str, name: str, known: set[str]) -> ConfigError:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return ConfigError(f"{where}: unknown setting {name!r}", hint=hint)
