"""What every op does before and around its call: refuses tensors of two devices, and names what went wrong in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmkv.errors import KernelError, LayoutError


def same_device(op: str, **tensors: torch.Tensor) -> None:
    """Raises LayoutError, naming both devices, unless all tensors lie on one."""
    (first, here), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != here.device:
            raise LayoutError(
                f"{op} was given {first} on {here.device} and {name} on {tensor.device}",
                hint="both have to lie on one device: move one of them, or go through staging there",
            )


@contextmanager
def kernel_errors(op: str) -> Iterator[None]:
    """Errors of torch and of compiled code within become KernelError: out of memory, a refused argument, a failed
    launch, or what an earlier kernel of this device has done wrong. Also a decorator."""
    try:
        yield
    except (RuntimeError, IndexError, MemoryError) as error:
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0] if said else 'no message'}"
        raise KernelError(f"{op} failed: {reason}", hint="what it has written is not to be used") from error
