"""Reading `kv_transfer_params["lmkv"]` of a request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmkv.addresses import split_address
from lmkv.errors import ConfigError
from lmkv.ids import TransferId

logger = logging.getLogger(__name__)

_ID_LENGTH = 32
_WITHOUT_TRANSFER = frozenset({"approximate", "probe", "ledger"})
"""What a request without a transfer may say."""


@dataclass(frozen=True, slots=True)
class RequestParams:
    transfer_id: TransferId
    role: Literal["prefill", "decode"]
    peer_address: str


def is_approximate(params: Mapping[str, Any] | None) -> bool:
    """The request's KV is not exactly what its tokens give (or it asks not to be pooled): it gets no name."""
    ours = (params or {}).get("lmkv")
    return isinstance(ours, Mapping) and bool(ours.get("approximate"))


def is_probe(params: Mapping[str, Any] | None) -> bool:
    """The router asks to compare KV (lmkv/router/shadow.py): the reply tells what was in the prefix cache."""
    ours = (params or {}).get("lmkv")
    return isinstance(ours, Mapping) and bool(ours.get("probe"))


def ledger_id(params: Mapping[str, Any] | None) -> TransferId | None:
    """The name under which this request's ledger is kept: its transfer's, or `ledger` of a request without one."""
    ours = (params or {}).get("lmkv")
    if not isinstance(ours, Mapping):
        return None
    name = ours.get("transfer_id", ours.get("ledger"))
    return TransferId(name) if isinstance(name, str) and len(name) == _ID_LENGTH else None


def request_params(params: Mapping[str, Any] | None) -> RequestParams | None:
    """The request's part in a transfer; None for a request that runs as on plain vLLM.

    Unreadable parameters are logged and treated as none: a cache problem never fails a request.
    """
    ours = (params or {}).get("lmkv")
    if ours is None or (isinstance(ours, Mapping) and "transfer_id" not in ours and ours.keys() & _WITHOUT_TRANSFER):
        return None
    try:
        transfer_id, role, address = ours["transfer_id"], ours["role"], ours["peer"]["address"]
        split_address(address)
    except (KeyError, TypeError, ConfigError) as error:
        logger.warning("request ignored by lmkv: kv_transfer_params.lmkv=%r cannot be read: %r", ours, error)
        return None
    if role not in ("prefill", "decode") or not isinstance(transfer_id, str) or len(transfer_id) != _ID_LENGTH:
        logger.warning("request ignored by lmkv: role %r or transfer_id %r is not valid", role, transfer_id)
        return None
    return RequestParams(TransferId(transfer_id), role, address)
