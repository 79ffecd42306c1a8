"""The packings of vLLM's CPU attention: what its own kernel writes is where lmkv.layout says it is."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from lmkv import oracle
from lmkv.kernels import Cache, convert_blocks
from lmkv.layout import segments, vllm_cache
from lmkv.oracle import Bytes

pytest.importorskip("vllm", reason="vLLM is not installed")

# In a process of its own: on a processor that lacks the instructions it would die of SIGILL.
ENGINE = """
import sys
import torch, vllm.platforms
from vllm._custom_ops import cpu_attn_reshape_and_cache
blocks, heads = 3, 2
for case in sys.argv[2:]:
    isa, kind, n, d = case.split("-")
    dtype, n, d = getattr(torch, kind), int(n), int(d)
    cache = torch.zeros(blocks, heads, n, 2 * d, dtype=dtype)
    key_cache, value_cache = cache.view(blocks, heads, 2 * n, d).chunk(2, dim=2)
    key, value = torch.randn(2, blocks * n, heads, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    slots = torch.tensor([[2], [0], [1]]) * n + torch.arange(n)
    cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots.flatten(), isa)
    for name, tensor in (("cache", cache), ("key", key), ("value", value)):
        tensor.contiguous().view(torch.uint8).numpy().tofile(f"{sys.argv[1]}/{case}-{name}")
"""
BLOCKS, HEADS, SLOTS = 3, 2, [2, 0, 1]
CASES = {
    "vec": ["vec-bfloat16-32-64", "vec-float32-64-32", "vec16-bfloat16-16-48"],
    "amx": ["amx-bfloat16-32-64", "amx-bfloat16-64-128"],
}


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Bytes]]:
    """By case: the random K and V of three blocks, and the cache into which the engine's kernel has written them."""
    cases, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(folder), *cases], capture_output=True, text=True, check=False, timeout=110
    )
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"this processor cannot run vLLM's kernel for {request.param}: it died of SIGILL")
    if request.param == "amx" and "Unsupported CPU attention configuration" in done.stderr:
        pytest.skip("the build of vLLM for this processor has no kernel for amx")
    if "has no attribute 'cpu_attn_reshape_and_cache'" in done.stderr:
        pytest.skip("this vLLM is not built for the CPU")
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        case: {name: np.fromfile(folder / f"{case}-{name}", dtype=np.uint8) for name in ("cache", "key", "value")}
        for case in cases
    }


def test_the_engine_writes_where_the_map_says(written: dict[str, dict[str, Bytes]]) -> None:
    for case, found in written.items():
        interior, dtype, *numbers = case.split("-")
        n, d = map(int, numbers)
        sizes = {"layers": 1, "blocks": BLOCKS, "heads": HEADS, "block_tokens": n, "parts": (d, d), "dtype": dtype}
        packed, plain = vllm_cache("LBHNC", interior=interior, **sizes), vllm_cache("LBNHC", **sizes)
        # Token by token: all heads, K then V of each.
        rows = np.concatenate([found[x].reshape(BLOCKS * n, HEADS, -1) for x in ("key", "value")], axis=2).reshape(-1)
        table = segments(plain, packed, range(BLOCKS), SLOTS, (0, BLOCKS * n))

        ours = np.zeros_like(found["cache"])
        oracle.convert(oracle.Place.of(rows, plain), oracle.Place.of(ours, packed), table)
        assert np.array_equal(ours, found["cache"]), case

        compiled = Cache.empty(packed)
        convert_blocks(Cache.of(torch.from_numpy(rows), plain), compiled, table)
        assert np.array_equal(compiled.data.numpy(), found["cache"]), case
