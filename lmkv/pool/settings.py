"""Settings of a pool node. Precedence: command line > `LMKV_POOL_*` > default."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from lmkv.addresses import check_host, check_reachable, checked
from lmkv.settings import CommandSettings, refuse_unknown, split_list, wrong_value

from .faults import VARIABLE as FAULTS

ENV_PREFIX = "LMKV_POOL_"
_SIZES = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZES |= {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str | int) -> int:
    """`8GiB`, `512MB`, `1024`. Raises ValueError."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _SIZES:
        raise ValueError(f"{text!r} is no size; write it as 8GiB, 512MiB or a number of bytes")
    return int(float(found[1]) * _SIZES[found[2].upper()])


class NodeSettings(CommandSettings):
    """Sizes in bytes (or as text, 8GiB), times in seconds."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    listen: str = Field("tcp://127.0.0.1:18300", description="control address; port 0 picks a free one")
    advertise: str = Field("", description="host that others use instead of the listen host (for 0.0.0.0 and NAT)")
    name: str = Field("", description="name in logs and listings; default is pool, host and port")
    capacity: int = Field(2 << 30, ge=1 << 20, description="size of the arena in memory")
    huge: bool = Field(True, description="use huge pages if there are enough free ones")
    prefault: bool = Field(True, description="take the arena's memory at the start; otherwise as it is used")
    share: str = Field("", description="Unix socket that lets processes of this host map the arena; none: not at all")
    transport: str = Field("nixl://", description="data plane for other hosts; none: this host only")
    policy: Literal["s3fifo", "lru"] = Field("lru", description="what is evicted first")
    write_lease_s: float = Field(30.0, gt=0, description="a reserved slot has to be written within this time")
    quarantine_s: float = Field(
        600.0,
        gt=0,
        description="slots of a client of another host that is lost, neither answers nor is proven dead, are held this "
        "long; then the data plane is made anew",
    )
    pin_share: float = Field(0.5, gt=0, le=0.9, description="at most this part of the arena may be pinned")
    most_lease_s: float = Field(60.0, gt=0, description="longest lease of a pin")

    disk: str = Field("", description="directory of the disk tier; empty: none")
    disk_capacity: int = Field(16 << 30, ge=1 << 20, description="size of the disk tier")
    disk_segment: int = Field(256 << 20, ge=1 << 20, description="size of a file of the disk tier")
    disk_admit_hits: int = Field(0, ge=0, description="a page goes to disk after so many hits; 0: at once")
    object: str = Field("", description="URL of the object store (s3://bucket/prefix, file:///dir); empty: none")
    object_endpoint: str = Field("", description="endpoint of an S3-compatible server")
    object_region: str = Field("", description="region of the bucket")
    object_allow_http: bool = Field(False, description="allow an endpoint without TLS")
    object_admit_hits: int = Field(0, ge=0, description="a page goes to the object store after so many hits")
    key_file: str = Field("", description="file with the key for encryption at rest; empty: not encrypted")
    queue: int = Field(1 << 30, ge=1 << 20, description="bytes that may wait for a lower tier; more is not written")

    controller: Annotated[tuple[str, ...], NoDecode] = Field((), description="controllers to beat to")
    etcd: str = Field("", description="URL of an etcd to register with")
    etcd_prefix: str = Field("/lmkv/nodes", description="keys in etcd begin so")
    replicas: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="nodes that copy what is stored here with the promise of replicas"
    )
    beat_s: float = Field(1.0, gt=0, description="interval of signs of life")
    drain_s: float = Field(30.0, ge=0, description="on SIGTERM, time to write what only memory holds")

    @field_validator("capacity", "disk_capacity", "disk_segment", "queue", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("controller", "replicas", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_list(value)

    @field_validator("controller", "replicas")
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
    def _reachable(self) -> NodeSettings:
        check_reachable(self.listen, self.advertise)
        return self


def node_settings(given: Mapping[str, Any], environ: Mapping[str, str]) -> NodeSettings:
    """`given`: what stood on the command line. Raises ConfigError naming the setting, its value and what to do."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in NodeSettings.model_fields} | {FAULTS}
    refuse_unknown(environ, ENV_PREFIX, known, "a pool node", "lmkv pool", "LMKV-C100")
    try:
        return NodeSettings(**given)
    except ValidationError as error:
        raise wrong_value(error, ENV_PREFIX) from error


def default_share(incarnation: str) -> str:
    """Where this user's processes find the arena of a node."""
    base = os.environ.get("XDG_RUNTIME_DIR") or str(Path(tempfile.gettempdir(), f"lmkv-{os.getuid()}"))
    return str(Path(base, f"lmkv-pool-{incarnation}.sock"))
