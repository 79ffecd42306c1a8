"""A cache as the ops take it: bytes, layer offsets, geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmkv.errors import LayoutError
from lmkv.layout import WIDTHS, Array, Geometry, part_maps

TYPES = {name: i for i, name in enumerate(WIDTHS)}
"""The ops' number of a dtype; csrc/include/lmkv/types.h has the same."""


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """`data` is a contiguous uint8 tensor of one dimension on any device; it shares the memory it describes and keeps
    it alive. `layers` are byte offsets into it, an int64 CPU tensor with an entry for each layer of `geometry`."""

    data: torch.Tensor
    layers: torch.Tensor
    geometry: Geometry

    def __post_init__(self) -> None:
        if len(self.layers) != self.geometry.layers:
            raise LayoutError(f"{len(self.layers)} layer offsets for a geometry of {self.geometry.layers} layers")

    @classmethod
    def of(cls, data: torch.Tensor, geometry: Geometry, layers: Sequence[int] | Array | None = None) -> Cache:
        """`layers`: byte offsets; by default they follow from the layer stride."""
        offsets = geometry.layer_offsets_bytes() if layers is None else np.asarray(layers, dtype=np.int64)
        return cls(data, torch.from_numpy(np.ascontiguousarray(offsets)), geometry)

    @classmethod
    def empty(cls, geometry: Geometry, device: str | torch.device = "cpu") -> Cache:
        """New memory, zeroed."""
        return cls.of(torch.zeros(geometry.span_bytes(), dtype=torch.uint8, device=device), geometry)


def map_fields(g: Geometry) -> list[int]:
    """The index map as the ops take it: the fields of its parts, one after the other."""
    return [field for part in part_maps(g) for field in part.fields()]
