"""The device that a worker's caches lie on. Every call to one (streams, events, page-locked memory) is made here.

Host memory has a Device too, whose calls do nothing: what the CPU has computed is there. All others go through
`torch.get_device_module`, so that CUDA, ROCm and XPU are one; `standing_in` puts another module in its place, with
which tests and simulations have a device whose memory is the host's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lmkv.errors import KernelError
from lmkv.kernels import kernel_errors
from lmkv.transport import MemoryKind

from .commands import Fence

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every context of the process."""


@dataclass(frozen=True, slots=True)
class EventFence:
    """A Fence made of an event that has been recorded. May be asked from any thread."""

    event: Any

    def query(self) -> bool:
        """Raises KernelError when the device has failed: then nothing before the fence is known to have been done."""
        with kernel_errors("an event of the device"):
            return bool(self.event.query())


class Device:
    """`module` is what torch has for this kind of device (torch.cuda, …); None for host memory.

    Made by `device_of`. It holds nothing of the device and belongs to no thread; each method says whose stream it
    means. All raise KernelError where the device does not do what it is told.
    """

    def __init__(self, device: torch.device, module: Any | None) -> None:
        self.device = device
        self._module = module

    def __repr__(self) -> str:
        return f"Device({self.device})"

    @property
    def kind(self) -> MemoryKind:
        """Of the memory of its tensors, for the data plane."""
        return MemoryKind.DRAM if self._module is None else MemoryKind.VRAM

    @property
    def index(self) -> int:
        return int(self.device.index or 0)

    def enter_thread(self) -> None:
        """The calling thread works on this device from now on, on a stream of its own.

        Its first call, before memory is registered with a data plane: UCX leaves out CUDA IPC, and NVLink with it, for
        a thread without a device. On a stream of its own what the thread enqueues does not wait for the engine's
        kernels, and `wait` does not either.
        """
        if self._module is None:
            return
        with kernel_errors(f"making {self.device} the thread's device"):
            self._module.set_device(self.index)
            self._module.set_stream(self._module.Stream(device=self.device))

    def fence(self) -> Fence | None:
        """The end of what the calling thread has enqueued on its current stream so far; None for host memory, where it
        has been done."""
        if self._module is None:
            return None
        with kernel_errors(f"an event on {self.device}"):
            event = self._module.Event()
            event.record(self._module.current_stream(self.device))
        return EventFence(event)

    def wait(self) -> None:
        """Block until what the calling thread has enqueued on its current stream has been done."""
        if self._module is None:
            return
        with kernel_errors(f"waiting for {self.device}"):
            self._module.current_stream(self.device).synchronize()

    def register_host(self, address: int, size: int) -> None:
        """Page-lock `size` bytes of host memory, so that copies between them and the device run on their own. The
        caller owns the memory and keeps it mapped until `unregister_host`."""
        self._host_call("cudaHostRegister", address, size, _PORTABLE)

    def unregister_host(self, address: int) -> None:
        """Nothing is copied from or to that memory any more."""
        self._host_call("cudaHostUnregister", address)

    def _host_call(self, name: str, *arguments: int) -> None:
        if self._module is None:
            return
        with kernel_errors(name):
            runtime = getattr(self._module, "cudart", None)
            if runtime is None:
                raise KernelError(f"{self.device} has no {name}", hint="only CUDA and ROCm page-lock host memory here")
            code = int(getattr(runtime(), name)(*arguments))
        if code:
            told = ", ".join(f"{argument:#x}" for argument in arguments)
            raise KernelError(
                f"{name}({told}) failed with error {code}", hint="is there enough memory to lock (ulimit -l)?"
            )


HOST = Device(torch.device("cpu"), None)

_stand_ins: dict[str, Any] = {}


def device_of(where: torch.Tensor | torch.device) -> Device:
    """The device of a tensor, or the one that is named."""
    device = where if isinstance(where, torch.device) else where.device
    if device.type in _stand_ins:
        return Device(device, _stand_ins[device.type])
    return Device(device, None if device.type == "cpu" else torch.get_device_module(device))


@contextmanager
def standing_in(device_type: str, module: Any) -> Iterator[None]:
    """Devices of this type (also "cpu") go through `module` instead. Those made before are not changed."""
    before = dict(_stand_ins)
    _stand_ins[device_type] = module
    try:
        yield
    finally:
        _stand_ins.clear()
        _stand_ins.update(before)
