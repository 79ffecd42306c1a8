"""The same tokens, but other numbers: other weights or adapters at the same path, another dtype, rope or tenant.

Each is a miss, and the answer is the engine's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from .bed import MODELS, PROSE, Client, Engine, Node, counters, eventually, stopping

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHUNK = 128
COMMON = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--served-model-name", "tiny")
LORA = ("--enable-lora", "--max-lora-rank", "8")


@dataclass(frozen=True, slots=True)
class World:
    run: Path
    node: Node
    model: Path
    adapter: Path

    def start(self, name: str, core: str, *args: str, env: dict[str, str] | None = None) -> Engine:
        variables = {"LMKV_LOOKUP_MS": "500", **(env or {})}
        common = (*COMMON, "--pool", self.node.address)
        return Engine.start(name, "engine", self.run, *common, *args, model=str(self.model), core=core, env=variables)

    def lora(self) -> tuple[str, ...]:
        return (*LORA, "--lora-modules", f"judge={self.adapter}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    run = tmp_path_factory.mktemp("pool-names")
    model, adapter = run / "model", run / "adapter"
    shutil.copytree(MODELS / "tiny-llama", model)
    make_adapter(adapter, model, seed=1)
    node = Node.start("node", run)
    with stopping(node):
        node.wait_ready()
        yield World(run, node, model, adapter)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        yield Client(session, "tiny")


def make_adapter(path: Path, model: Path, seed: int) -> None:
    """A LoRA adapter with random weights, large enough to change answers."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("v_proj", kv)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{base}.lora_A.weight"] = rng.standard_normal((8, hidden)).astype(np.float32)
            tensors[f"{base}.lora_B.weight"] = rng.standard_normal((out, 8)).astype(np.float32)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(model)}))


def change_weights(model: Path) -> None:
    """Other values for one tensor, same file name, same shape."""
    path = model / "model.safetensors"
    tensors = load_tensors(path)
    name = next(name for name in sorted(tensors) if "v_proj" in name)
    tensors[name] = -tensors[name]
    save_tensors(tensors, path, metadata={"format": "pt"})


async def prompt_of(client: Client, engine: Engine) -> list[int]:
    return (await client.tokens(engine, f"A case for many judges. {PROSE * 4}"))[:700]


async def stored(node: Node, pages: int) -> None:
    async def there() -> bool:
        return bool(node.stats()["pages"] >= pages)

    await eventually(there, f"{pages} pages in the pool")


async def loaded(engine: Engine) -> int:
    return (await counters(engine)).get("pool:loaded_tokens", 0)


async def answer_alone(client: Client, engine: Engine, prompt: list[int], model: str = "tiny") -> str:
    """What the engine says without any cache."""
    await client.reset_cache(engine)
    lone = Client(client.session, model)
    mark = {"lmkv": {"approximate": True}}
    return (await lone.complete(engine.url, prompt, max_tokens=16, kv_transfer_params=mark)).text


async def check(client: Client, engine: Engine, prompt: list[int], expected: int, model: str = "tiny") -> str:
    """The engine loads `expected` tokens, and says what it would say without."""
    await client.reset_cache(engine)
    before = await loaded(engine)
    lone = Client(client.session, model)
    reply = await lone.complete(engine.url, prompt, max_tokens=16)
    assert await loaded(engine) - before == expected
    assert reply.text == await answer_alone(client, engine, prompt, model)
    return reply.text


async def adapter_known(client: Client, engine: Engine) -> None:
    """The first request with an adapter has its files read; until they are, requests with it are not pooled."""
    lone = Client(client.session, "judge")

    async def known() -> bool:
        name = "pool:not_pooled:adapter_unknown"
        before = (await counters(engine)).get(name, 0)
        await lone.complete(engine.url, [1, 2, 3], max_tokens=1)
        return (await counters(engine)).get(name, 0) == before

    await eventually(known, "the adapter to be known")


async def test_only_the_same_numbers_are_shared(world: World, client: Client) -> None:
    """One engine stores, with and without an adapter; then two others at a time try."""
    first, tenant = world.start("first", "0", *world.lora()), world.start("tenant", "1", env={"LMKV_TENANT": "other"})
    with stopping(first, tenant):
        first.wait_ready()
        tenant.wait_ready()
        prompt = await prompt_of(client, first)
        own = await check(client, first, prompt, 0)
        await stored(world.node, 5)
        await adapter_known(client, first)
        adapted = await check(client, first, prompt, 0, "judge")
        await stored(world.node, 10)
        assert adapted != own, "the adapter changes nothing: this test would show nothing"
        await check(client, tenant, prompt, 0)
        await stored(world.node, 15)
    rope = world.start(
        "rope", "0", "--hf-overrides", '{"rope_parameters": {"rope_type": "default", "rope_theta": 500}}'
    )
    half = world.start("half", "1", "--dtype", "bfloat16")
    with stopping(rope, half):
        rope.wait_ready()
        half.wait_ready()
        assert await check(client, rope, prompt, 0) != own, "the other rope changes nothing"
        before = await loaded(half)
        await client.complete(half.url, prompt)
        assert await loaded(half) == before
        await stored(world.node, 25)
    make_adapter(world.adapter, world.model, seed=2)
    again = world.start("again", "0", *world.lora())
    with stopping(again):
        again.wait_ready()
        assert await check(client, again, prompt, 5 * CHUNK) == own
        await adapter_known(client, again)
        assert await check(client, again, prompt, 0, "judge") != adapted
        await stored(world.node, 30)
    change_weights(world.model)
    swapped = world.start("swapped", "0")
    with stopping(swapped):
        swapped.wait_ready()
        assert await check(client, swapped, prompt, 0) != own
        await stored(world.node, 35)
        change_weights(world.model)  # under the feet of an engine that has loaded the others
        assert await check(client, swapped, prompt, 5 * CHUNK) != own
    spaces = world.node.stats()["namespaces"]
    assert len(spaces) == 5  # first and again, tenant, rope, half, swapped
