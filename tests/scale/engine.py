"""Both halves of the connector in a process of their own, on small caches, stepped as vLLM does. No model.

    python -m tests.scale.engine --transport tcp://127.0.0.1

Prints one JSON line with its control address; then takes commands on stdin, one a line:

    decode TRANSFER_ID PEER_ADDRESS     a request whose prompt comes from that peer
    prefill TRANSFER_ID PEER_ADDRESS    a request whose KV goes to that peer
    count                               prints {"counted": {…}, "open": requests that have not ended}
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors.numpy import save_file
from vllm.v1.outputs import KVConnectorOutput

from lmkv.config import ConnectorSettings
from lmkv.vllm.geometry import Shard
from lmkv.vllm.scheduler import SchedulerSide
from lmkv.vllm.worker import WorkerSide

LAYERS, BLOCKS, HEADS, TOKENS, ELEMENTS = 2, 32, 2, 16, 64
PROMPT_BLOCKS = 4
TIMES = {"beat_s": 0.2, "lease_s": 1.0, "hold_s": 4.0, "deadline_s": 4.0, "pair_s": 4.0}
STEP_S = 0.005


class FullAttentionSpec:
    head_size = head_size_v = ELEMENTS // 2
    block_size = TOKENS


def small_caches() -> tuple[dict[str, torch.Tensor], Any]:
    storage = torch.zeros((LAYERS, BLOCKS, HEADS, TOKENS, ELEMENTS), dtype=torch.float32)
    views = {f"layer.{i}": layer for i, layer in enumerate(storage)}
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec())
    config = SimpleNamespace(
        transfer_group_index_by_layer=dict.fromkeys(views, 0),
        transfer_groups=[group],
        kv_cache_groups=[group],
        num_blocks=BLOCKS,
        kv_cache_layout="LBHNC",
        select_transfer_block_ids=lambda tables: tables,
    )
    return views, config


def small_config(model: Path) -> Any:
    """What the connector reads of vLLM's configuration; anything else is some mock."""
    save_file({"weight": np.zeros(8, dtype=np.float32)}, model / "model.safetensors")
    config = MagicMock()
    config.parallel_config = SimpleNamespace(
        pipeline_parallel_size=1,
        tensor_parallel_size=1,
        data_parallel_rank=0,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        enable_dbo=False,
    )
    config.kv_transfer_config.kv_role = "kv_both"
    config.speculative_config = None
    config.model_config.model = str(model)
    config.model_config.architectures = ["Small"]
    config.model_config.hf_text_config.to_dict = lambda: {"layers": LAYERS}
    config.model_config.max_model_len = 1024
    config.model_config.model_weights = ""
    config.model_config.revision = None
    config.load_config = SimpleNamespace(
        load_format="auto", download_dir=None, model_loader_extra_config={}, ignore_patterns=["original/**/*"]
    )
    config.model_config.enable_sleep_mode = False
    return config


class BlockPool:
    """Counts what is in quarantine."""

    def __init__(self) -> None:
        self.blocks = list(range(BLOCKS))
        self.cached_block_hash_to_block: dict[Any, Any] = {}
        self.held = 0

    def touch(self, blocks: list[int]) -> None:
        self.held += len(blocks)

    def free_blocks(self, blocks: Any) -> None:
        self.held -= len(list(blocks))


class SmallEngine:
    """One rank. `step` does what vLLM's engine does in one step."""

    def __init__(self, transport: str, model: Path) -> None:
        settings = ConnectorSettings(listen="tcp://127.0.0.1:0", name="small", transport=transport, **TIMES)
        views, caches = small_caches()
        config = small_config(model)
        self.worker = WorkerSide(config, caches, settings, 0)  # type: ignore[arg-type]
        self.worker.register(views, "FLASH_ATTN", Shard(0, 1, HEADS))
        self.scheduler = SchedulerSide(config, caches, settings)
        self.scheduler.start({0: self.worker.handshake()})
        self.pool = BlockPool()
        self.scheduler.bind_block_pool(self.pool)
        self.layers = list(views)
        self.waiting: list[Any] = []
        """Decode requests whose tokens are not decided."""
        self.loading: dict[str, Any] = {}
        self.starting: list[Any] = []
        """Prefill requests to be computed in the next step."""
        self.counted: Counter[str] = Counter()
        self._finished: set[str] = set()
        self._sending: set[str] = set()

    @property
    def address(self) -> str:
        return self.scheduler._endpoint.address

    @property
    def open(self) -> int:
        return len(self.waiting) + len(self.loading) + len(self.starting) + len(self._sending)

    def submit(self, role: str, transfer_id: str, peer: str) -> None:
        tokens = list(range(PROMPT_BLOCKS * TOKENS))
        params = {"lmkv": {"transfer_id": transfer_id, "role": role, "peer": {"address": peer}}}
        request = SimpleNamespace(
            request_id=f"r{transfer_id}",
            num_prompt_tokens=len(tokens),
            num_tokens=len(tokens),
            num_computed_tokens=0,
            num_preemptions=0,
            prompt_token_ids=tokens,
            all_token_ids=tokens,
            prompt_embeds=None,
            mm_features=[],
            lora_request=None,
            cache_salt=None,
            pooling_params=None,
            resumable=False,
            skip_reading_prefix_cache=False,
            kv_transfer_params=params,
            status=SimpleNamespace(name="FINISHED_STOPPED"),
        )
        self.scheduler.new_request(request)
        (self.waiting if role == "decode" else self.starting).append(request)

    def step(self) -> None:
        self._decide()
        starting, self.starting = self.starting, []
        new = [SimpleNamespace(req_id=request.request_id, num_computed_tokens=0) for request in starting]
        output = SimpleNamespace(
            preempted_req_ids=(),
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={request.request_id: request.num_prompt_tokens for request in starting},
            total_num_scheduled_tokens=sum(request.num_prompt_tokens for request in starting),
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda request_id: (self._table(),)),
        )
        meta = self.scheduler.build_meta(output)
        self.worker.before_forward(meta)
        self.worker.bind(meta)
        if starting:
            for name in self.layers:
                self.worker.layer_done(name)
        self.worker.sweep()
        self._end_step()
        for request in starting:
            self._finished.add(request.request_id)
            if self.scheduler.finished(request):
                self._sending.add(request.request_id)

    def _table(self) -> list[int]:
        return [*range(1, PROMPT_BLOCKS + 1)]

    def _decide(self) -> None:
        for request in list(self.waiting):
            tokens, _ = self.scheduler.matched_tokens(request, 0)
            if tokens is None:
                continue
            self.waiting.remove(request)
            blocks = SimpleNamespace(get_block_ids=lambda: (self._table(),))
            self.scheduler.allocated(request, blocks, tokens)
            if tokens:
                self.loading[request.request_id] = request
            else:
                self.counted["computed"] += 1
                self.scheduler.finished(request)

    def _end_step(self) -> None:
        finished, self._finished = self._finished, set()
        sent, received, failed = self.worker.results(finished)
        meta = self.worker.worker_meta()
        self.scheduler.take_output(KVConnectorOutput(finished_sending=sent, kv_connector_worker_meta=meta))
        self._sending -= sent
        self.counted["sent"] += len(sent)
        self.counted["failed"] += len(failed)
        self.counted["received"] += len(received - failed)
        for request_id in received:
            self.scheduler.finished(self.loading.pop(request_id))

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()


def run(engine: SmallEngine) -> None:
    """Until stdin ends."""
    print(json.dumps({"ready": engine.address}), flush=True)
    waiting = b""
    while True:
        if select.select([0], [], [], STEP_S)[0]:
            told = os.read(0, 65536)
            if not told:
                return
            *lines, waiting = (waiting + told).split(b"\n")
            for line in lines:
                obey(engine, line.decode().split())
        engine.step()


def obey(engine: SmallEngine, words: list[str]) -> None:
    if words[0] == "count":
        counted = dict(engine.counted) | engine.scheduler.book.counts()
        print(json.dumps({"counted": counted, "open": engine.open, "held": engine.pool.held}), flush=True)
    else:
        engine.submit(*words)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--transport", default="tcp://127.0.0.1")
    with tempfile.TemporaryDirectory() as model:
        engine = SmallEngine(options.parse_args().transport, Path(model))
        try:
            run(engine)
        finally:
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
