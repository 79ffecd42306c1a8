"""Helpers of the benchmarks: engines on pinned cores, links between them, prompts, requests and statistics."""
