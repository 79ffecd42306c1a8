"""lmkv joins vLLM engines: KV computed once is pushed where it is needed.

Importing this package costs neither torch nor nixl; engines load `lmkv.vllm.connector` by module path.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
