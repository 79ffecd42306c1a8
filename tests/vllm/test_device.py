"""The device seam: what is called of a device, in which thread, and what becomes of its errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import zmq

from lmkv.config import ConnectorSettings
from lmkv.errors import ConfigError, KernelError
from lmkv.ids import Rank
from lmkv.transport import Capabilities, MemoryKind, Region
from lmkv.vllm import device, memory
from lmkv.vllm.device import HOST, device_of, standing_in
from lmkv.vllm.geometry import Shard
from lmkv.vllm.pooled.staging import Staging
from lmkv.vllm.writer import WorkerLoop

from .fake_device import FakeModule
from .test_landing import FullAttentionSpec

CPU = torch.device("cpu")


@pytest.fixture
def fake() -> Iterator[FakeModule]:
    """Host memory counts as memory of this device."""
    module = FakeModule()
    with standing_in("cpu", module):
        yield module


def caches(*devices: str) -> tuple[dict[str, torch.Tensor], Any]:
    """One layer on each, and what is read of vLLM's KV cache config."""
    found = {f"layer.{i}": torch.zeros(4, 2, 16, 16, device=d) for i, d in enumerate(devices)}
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec(8, 8, 16))
    config = SimpleNamespace(
        transfer_group_index_by_layer=dict.fromkeys(found, 0), transfer_groups=(group,), num_blocks=4
    )
    return found, config


def described(*devices: str) -> memory.KvMemory:
    return memory.describe(*caches(*devices), "FLASH_ATTN", Shard(0, 1, 2))


def test_host_memory_needs_no_fence_and_asks_no_module() -> None:
    host = device_of(torch.zeros(1))
    assert (host.kind, host.index) == (MemoryKind.DRAM, 0)
    with mock.patch.object(torch, "get_device_module", side_effect=AssertionError):
        host.enter_thread()
        assert host.fence() is None
        host.wait()
        host.register_host(4096, 4096)
        host.unregister_host(4096)
    assert HOST.fence() is None


def test_other_devices_go_through_the_module_that_torch_has_for_them() -> None:
    module = FakeModule()
    with mock.patch.object(torch, "get_device_module", return_value=module) as asked:
        gpu = device_of(torch.device("cuda", 3))
    assert asked.call_args.args == (torch.device("cuda", 3),)
    assert (gpu.kind, gpu.index) == (MemoryKind.VRAM, 3)
    gpu.enter_thread()
    assert module.calls[0][1:] == ("set_device", (3,))


def test_a_fence_passes_when_the_device_has_come_so_far(fake: FakeModule) -> None:
    fence = device_of(CPU).fence()
    assert fence is not None and not fence.query()
    later = device_of(CPU).fence()
    assert later is not None
    fake.events[0].passed = True
    assert fence.query() and not later.query()
    fake.pass_events()
    assert later.query()
    assert [given for _, call, given in fake.calls if call == "record"] == [("default",)] * 2


def test_a_thread_that_has_entered_works_on_a_stream_of_its_own(fake: FakeModule) -> None:
    """Its fences and waits are of that stream; those of the engine's thread stay where they were."""
    engines = device_of(CPU).fence()

    def work() -> None:
        here = device_of(CPU)
        here.enter_thread()
        here.fence()
        here.wait()

    thread = threading.Thread(target=work, name="loop")
    thread.start()
    thread.join()
    assert [(call, given) for who, call, given in fake.calls if who == "loop"] == [
        ("set_device", (0,)),
        ("set_stream", ("stream-1",)),
        ("record", ("stream-1",)),
        ("synchronize", ("stream-1",)),
    ]
    assert fake.events[1].passed and engines is not None and not engines.query()


@pytest.mark.parametrize("call", ["enter_thread", "wait", "query"])
def test_an_error_of_the_device_is_a_kernel_error(fake: FakeModule, call: str) -> None:
    here = device_of(CPU)
    fence = here.fence()
    fake.failing = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(KernelError, match=r"LMKV-K900 .*illegal memory access"):
        fence.query() if call == "query" and fence else getattr(here, call)()


def test_host_memory_is_page_locked(fake: FakeModule) -> None:
    here = device_of(CPU)
    here.register_host(0x10000, 8192)
    here.unregister_host(0x10000)
    assert [c[1:] for c in fake.calls] == [
        ("cudaHostRegister", (0x10000, 8192, 1)),
        ("cudaHostUnregister", (0x10000,)),
    ]
    fake.host_error = 2
    with pytest.raises(KernelError, match=r"cudaHostRegister\(0x10000, 0x2000, 0x1\) failed with error 2 · .*ulimit"):
        here.register_host(0x10000, 8192)


def test_a_device_that_locks_no_memory_says_so() -> None:
    with standing_in("cpu", SimpleNamespace()), pytest.raises(KernelError, match="cpu has no cudaHostRegister"):
        device_of(CPU).register_host(4096, 4096)


def test_a_stand_in_ends_with_its_block() -> None:
    with standing_in("cpu", FakeModule()):
        assert device_of(CPU).kind is MemoryKind.VRAM
    assert device_of(CPU).kind is MemoryKind.DRAM
    assert not device._stand_ins


# --- memory that lies there ---


def test_caches_on_two_devices_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'layer.0' lies on cpu, that of 'layer.2' on meta"):
        described("cpu", "cpu", "meta")


def test_caches_in_host_memory_are_warmed_there() -> None:
    found = described("cpu")
    card = found.card(Rank(0), "", "", b"")
    assert (found.kind, found.device_scratch, found.warm_extents.kind) == (MemoryKind.DRAM, None, MemoryKind.DRAM)
    assert (card.scratch_address, card.scratch_kind) == (found.scratch.ctypes.data, "DRAM")


def test_caches_on_a_device_have_a_scratch_there(fake: FakeModule) -> None:
    """The pool's stays in host memory, for its nodes write to that."""
    found = described("cpu")
    card, scratch = found.card(Rank(0), "", "", b""), found.device_scratch
    assert found.kind is MemoryKind.VRAM and scratch is not None
    assert (card.scratch_address, card.scratch_kind) == (scratch.data_ptr(), "VRAM")
    assert found.warm_extents.kind is MemoryKind.VRAM and found.warm_extents.total_bytes == card.scratch_bytes
    assert int(found.warm_extents.table[0, 0]) == scratch.data_ptr()
    kinds = {region.address: region.kind for region in found.regions}
    assert kinds[scratch.data_ptr()] is MemoryKind.VRAM and kinds[found.scratch.ctypes.data] is MemoryKind.DRAM
    assert int(found.scratch_extents.table[0, 0]) == found.scratch.ctypes.data


def test_slots_and_staging_are_of_the_devices_kind(fake: FakeModule) -> None:
    slots, staging = memory.landing_slots(1 << 16, 1 << 14, CPU), Staging(1 << 16, 1 << 14, CPU)
    assert slots is not None and slots.region().kind is MemoryKind.VRAM
    assert staging.region().kind is staging.extents([0], 64).kind is MemoryKind.VRAM
    assert not staging.in_host_memory


def test_the_loops_thread_enters_the_device_before_it_registers_memory(fake: FakeModule) -> None:
    found = described("cpu")
    transport = mock.Mock(capabilities=Capabilities(frozenset(MemoryKind), True, False, True), in_flight=0)
    transport.fds.return_value, transport.poll.return_value, transport.export.return_value = [], [], b"x"
    seen: list[list[str]] = []
    transport.register.side_effect = lambda region: seen.append(fake.names(threading.current_thread().name))
    loop = WorkerLoop(ConnectorSettings(), Rank(0), transport, found, "tcp://127.0.0.1:0")
    loop.start()
    loop.close()
    assert not loop.alive
    assert seen == [["set_device", "set_stream"]] * len(found.regions)
    assert [type(call.args[0]) for call in transport.register.call_args_list] == [Region] * 3


def test_a_device_that_cannot_be_entered_fails_the_start(fake: FakeModule) -> None:
    found = described("cpu")
    fake.failing = "CUDA error: invalid device ordinal"
    loop = WorkerLoop(ConnectorSettings(), Rank(0), mock.Mock(), found, "tcp://127.0.0.1:0")
    with pytest.raises(KernelError, match="invalid device ordinal"):
        loop.start()
    loop.close()
    assert not loop.alive


def test_the_context_of_zeromq_is_closed_with_a_failed_loop(fake: FakeModule) -> None:
    """What a failed start has opened is closed: the address is free again."""
    found = described("cpu")
    fake.failing = "CUDA error: invalid device ordinal"
    loop = WorkerLoop(ConnectorSettings(), Rank(0), mock.Mock(), found, "tcp://127.0.0.1:0")
    address = loop.address
    with pytest.raises(KernelError):
        loop.start()
    loop.close()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
    context.term()
