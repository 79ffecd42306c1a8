"""Every error lmkv raises on purpose.

    LmkvError
    ├── ConfigError              LMKV-C1xx  a setting is missing, malformed or contradictory
    ├── WireError                LMKV-W2xx  a message cannot be read or is of another protocol version
    ├── CompatError              LMKV-F3xx  two engines must not exchange KV
    ├── TransportError           LMKV-T4xx  the data plane
    │   ├── SchemeError              T401  unknown scheme, or its library is not installed
    │   ├── RegistrationError        T402  memory cannot be registered
    │   ├── ConnectError             T403  a peer cannot be reached or its export is not readable
    │   ├── ExtentError              T404  an extent lies outside registered memory
    │   ├── PeerLostError            T405  the peer died; nothing more of this operation will land
    │   └── StateError               T406  the call does not fit the object's state (double release, closed, …)
    ├── LayoutError              LMKV-L7xx  a KV layout cannot exist, or cannot be converted
    ├── KernelError              LMKV-K9xx  an op on caches failed in torch or on its device; one transfer or page ends
    ├── TransferError            LMKV-X5xx  one transfer went wrong; the request is computed instead
    ├── PoolError                LMKV-P8xx  the shared cache pool; a miss, or a question that was not answered
    └── RouterError              LMKV-R6xx  no engine could serve a request

Form of a message: what happened · with which values · what to do (`hint`). A foreign exception is turned into one of
these at the border where it occurs, and nowhere else. `assert` is for our own bugs; user input never asserts.
"""

from __future__ import annotations


class LmkvError(Exception):
    """Base of all. `code` is stable and documented; `hint` says what to do and may be empty."""

    code = "LMKV-0000"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.code} {self.message}" + (f" · {self.hint}" if self.hint else "")


class ConfigError(LmkvError):
    code = "LMKV-C100"


class WireError(LmkvError):
    code = "LMKV-W200"


class CompatError(LmkvError):
    """Two engines differ in a field that must match. `field`, `ours`, `theirs` name it."""

    code = "LMKV-F300"

    def __init__(self, field: str, ours: str, theirs: str, *, hint: str = "", peer: str = "the peer") -> None:
        super().__init__(f"{peer} differs in {field!r}: ours {ours!r}, theirs {theirs!r}", hint=hint)
        self.field = field
        self.ours = ours
        self.theirs = theirs


class LayoutError(LmkvError):
    code = "LMKV-L700"


class KernelError(LmkvError):
    code = "LMKV-K900"


class TransportError(LmkvError):
    code = "LMKV-T400"


class SchemeError(TransportError):
    code = "LMKV-T401"


class RegistrationError(TransportError):
    code = "LMKV-T402"


class ConnectError(TransportError):
    code = "LMKV-T403"


class ExtentError(TransportError):
    code = "LMKV-T404"


class PeerLostError(TransportError):
    code = "LMKV-T405"


class StateError(TransportError):
    code = "LMKV-T406"


class TransferError(LmkvError):
    code = "LMKV-X500"


class RouterError(LmkvError):
    code = "LMKV-R600"


class PoolError(LmkvError):
    code = "LMKV-P800"
