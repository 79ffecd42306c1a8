"""The model runners of one engine: all its ranks, a stream each, and vLLM's own calls of the connector.

Model Runner V1's hooks are called by its mixin, V2's by ActiveKVConnector, as vLLM does. Both find the connector and
the rank in globals of vLLM, which are swapped around each rank's turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from .caches import RankCaches
from .kinds import SHAPE, EngineKind, layer_names
from .steps import Piece, Sequence, Step
from .stream import Stream
from .values import sampled


class _Layer(AttentionLayerBase):  # type: ignore[misc]
    """An attention layer of which only the back end's name is asked."""

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: "FLASH_ATTN")

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError("the cache configuration of a simulated engine is given")


def add_layers(vllm_config: Any) -> None:
    for name in layer_names():
        vllm_config.compilation_config.static_forward_context[name] = _Layer()


class Rank:
    """One worker: caches and the connector's worker half."""

    def __init__(self, kind: EngineKind, rank: int, vllm_config: Any, cache_config: Any, make: Callable[..., Any]):
        self.kind = kind
        self.number = rank
        self.caches = RankCaches(kind, rank)
        self.config = vllm_config
        self._group = SimpleNamespace(rank_in_group=rank, world_size=kind.ranks)
        self.connector: Any = None
        with self.active():
            self.connector = make(vllm_config, KVConnectorRole.WORKER, cache_config)
        with self.active():
            if kind.is_v2:
                self._v2 = ActiveKVConnector(vllm_config, self.caches.tensors)
            else:
                self.connector.register_kv_caches(self.caches.tensors)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """vLLM's globals are this rank's."""
        before = kv_transfer_state._KV_CONNECTOR_AGENT, parallel_state._TP
        kv_transfer_state._KV_CONNECTOR_AGENT, parallel_state._TP = self.connector, self._group
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT, parallel_state._TP = before

    def use_fences(self, fence: Callable[[], Any]) -> None:
        """The connector takes the caches for device memory whose stream is the engine's."""
        self.connector._worker._fence = fence

    # --- one step, in vLLM's order ---

    def before(self, output: Any) -> None:
        """V1's fence; V2 has it in pre_forward."""
        with self.active():
            if self.kind.is_v2:
                self._v2.pre_forward(output)
            else:
                self.connector.handle_preemptions(output.kv_connector_metadata)

    def forward(self, output: Any, launch: Callable[[int], None]) -> Callable[[], Any]:
        """Launches the layers with their hooks. The result of the connector is asked for by what is returned."""
        with self.active(), set_forward_context(None, self.config):
            if self.kind.is_v2:
                if output.total_num_scheduled_tokens:
                    self._layers(launch)
                self._v2.finish_forward()
                return lambda: self._post_forward(output)
            with KVConnectorModelRunnerMixin._get_kv_connector_output(output) as found:
                if output.total_num_scheduled_tokens:
                    self._layers(launch)
            return lambda: found

    def _post_forward(self, output: Any) -> Any:
        with self.active(), set_forward_context(None, self.config):
            return self._v2.post_forward(output.finished_req_ids)

    def _layers(self, launch: Callable[[int], None]) -> None:
        for layer, name in enumerate(layer_names()):
            launch(layer)
            self.connector.save_kv_layer(name, self.caches.tensors[name], None)

    def close(self) -> None:
        with self.active():
            self.connector.shutdown()


class Runner:
    """All ranks. `check(rank, piece, layer)` is called whenever the model uses what a layer's cache holds."""

    def __init__(self, ranks: list[Rank], check: Callable[[Rank, Piece, int], None]) -> None:
        self.ranks = ranks
        self.stream = Stream()
        """One for all ranks, which wait for each other in every layer anyway."""
        self._at_once = not ranks[0].kind.is_async
        """As on a CPU: what is launched has been done."""
        for rank in ranks:
            rank.use_fences(lambda: None if self._at_once else self.stream.fence())
        self._check = check
        self._sequences: dict[str, Sequence] = {}
        self._aggregator = KVOutputAggregator(len(ranks))

    def sequence(self, request: Any, seed: int, fresh: bool) -> Sequence:
        """The device's view of a request; made anew when it is scheduled first, or again after a preemption."""
        known = self._sequences.get(request.request_id)
        if known is None or fresh:
            known = Sequence(request.request_id, seed, request.all_token_ids, request.num_preemptions)
            self._sequences[request.request_id] = known
        return known

    def forget(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            self._sequences.pop(request_id, None)

    def launch(self, step: Step) -> None:
        """Everything of a step but its end. What has been freed is poisoned once nobody may read it any more."""
        for rank in self.ranks:
            rank.before(step.output)
        for rank in self.ranks:
            rank.caches.poison(step.freed)
        self.forget(step.output.finished_req_ids)
        ends = [
            rank.forward(step.output, lambda layer, rank=rank: self._layer(rank, step, layer)) for rank in self.ranks
        ]
        step.position = self._launch(lambda: self._sample(step))
        # V2 asks for the connector's results once sampling has been launched, V1 has done so before.
        step.results = [end() for end in ends]

    def _layer(self, rank: Rank, step: Step, layer: int) -> None:
        def run() -> None:
            for piece in step.pieces:
                rank.caches.write(layer, piece.block_ids, piece.lo, piece.hi, piece.sequence)
            for piece in step.pieces:
                self._check(rank, piece, layer)

        self._launch(run)

    def _launch(self, operation: Callable[[], None]) -> int:
        position = self.stream.launch(operation)
        if self._at_once:
            self.stream.synchronize(position)
        return position

    def _sample(self, step: Step) -> None:
        first = self.ranks[0]
        for piece in step.pieces:
            if piece.hi == len(piece.sequence.tokens):
                read = first.caches.read(SHAPE.layers - 1, piece.block_ids, piece.hi)
                token = sampled(read)
                piece.sampled.append(token)
                piece.sequence.append(token)

    def finish(self, step: Step) -> ModelRunnerOutput:
        """Waits for the device, as taking the sampled tokens does."""
        self.stream.synchronize(step.position)
        outputs = [self._output(step, result) for result in step.results]
        if len(outputs) == 1:
            return outputs[0]
        return self._aggregator.aggregate(outputs)

    def _output(self, step: Step, connector_output: Any) -> ModelRunnerOutput:
        ids = [piece.sequence.request_id for piece in step.pieces]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[piece.sampled for piece in step.pieces],
            kv_connector_output=connector_output,
        )


def block_array(block_ids: list[int]) -> Any:
    return np.asarray(block_ids, dtype=np.int64)
