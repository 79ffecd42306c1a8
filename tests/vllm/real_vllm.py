"""What tests take from vLLM itself. Its import warns of things that are not ours, and takes several seconds."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm import SamplingParams
    from vllm.v1.request import Request

__all__ = ["Request", "SamplingParams"]
