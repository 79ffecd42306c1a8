"""lmkv joins vLLM engines: KV computed once is pushed where it is needed.

Importing this package costs neither torch nor nixl; engines load `lmkv.vllm.connector` by module path.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import LmkvClient

__version__ = "0.1.0"

__all__ = ["LmkvClient", "__version__"]


def __getattr__(name: str) -> Any:
    """`lmkv.LmkvClient`, imported when it is first asked for: it needs torch."""
    if name == "LmkvClient":
        return import_module(".client", __name__).LmkvClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
