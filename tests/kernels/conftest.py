from .shim import shim_library

__all__ = ["shim_library"]
