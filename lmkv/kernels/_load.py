"""Finds and loads the compiled libraries; declares the ops, whose implementations register themselves by device."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_MAPS = (
    "Tensor source, Tensor source_layers, int[] source_map, Tensor(a!) target, Tensor target_layers, int[] target_map"
)
_SUMS = "Tensor(b!) sums, Tensor segments, int[] shape, int[] page, int source_type, int target_type"
_PAGES = "Tensor pages, Tensor page_layers, int[] page_map"
_CODED = "Tensor coded, Tensor coded_layers, int[] coded_map"
_CODEC = "Tensor moves, int[] shape, int dtype, int codec"
SCHEMAS = {
    "convert_blocks": f"({_MAPS}, Tensor segments, int[] shape, int source_type, int target_type) -> ()",
    "pack_pages": f"({_MAPS}, {_SUMS}) -> ()",
    "unpack_pages": f"({_MAPS}, {_SUMS}) -> ()",
    "encode_pages": f"({_PAGES}, {_CODED.replace('Tensor coded', 'Tensor(a!) coded', 1)}, {_CODEC}) -> ()",
    "decode_pages": f"({_CODED}, {_PAGES.replace('Tensor pages', 'Tensor(a!) pages', 1)}, {_CODEC}) -> ()",
    "rotate_keys": (
        "(Tensor(a!) keys, Tensor layers, int[] map, Tensor runs, Tensor turns, int[] shape, int dtype) -> ()"
    ),
    "checksum_runs": "(Tensor data, Tensor runs, int first, Tensor(a!) sum) -> ()",
}
"""By op. csrc/ops/*arguments.h say what the lists of numbers are."""


def declare() -> None:
    for name, schema in SCHEMAS.items():
        torch.library.define(f"lmkv::{name}", schema)


def load() -> dict[str, Path]:
    """Load what is there: {"cpu": path, "cuda": path}. A library that does not fit is left out with a warning."""
    folders = [Path(folder) for folder in importlib.import_module("lmkv.kernels").__path__]
    found: dict[str, Path] = {}
    for device, wanted in (("cpu", True), ("cuda", torch.version.cuda is not None or torch.version.hip is not None)):
        path = next((p for folder in folders if (p := folder / f"liblmkv_{device}.so").is_file()), None)
        if path is None or not wanted:
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            logger.warning("%s cannot be loaded, the reference is used instead: %s", path, error)
        else:
            found[device] = path
    return found
