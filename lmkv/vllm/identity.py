"""What this engine's weights are called, so that two engines that have the same name compute the same KV.

Weights have a digest if the files that they were loaded from lie on this host and are still what was loaded. All other
weights are **private**: their name is this engine's alone. It pairs with no other engine then, and its pages in the
pool are for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmkv.errors import ConfigError
from lmkv.ids import Incarnation
from lmkv.weights import file_digest, locate, newest_s, process_start_s, weight_files, weights_digest

PRIVATE = "private"
"""Names of private weights begin so."""
_FROM_FILES = {
    *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor"),
    *("mistral", "npcache", "pt", "sharded_state"),
}
"""Load formats that read the weight files of the model's folder and nothing else."""
_ELSEWHERE = {
    *("MoonshotKimiaForCausalLM", "FunAudioChatForConditionalGeneration"),
    *("Cosmos3ForConditionalGeneration", "Cosmos3EdgeForConditionalGeneration"),
    "UltravoxModel",
}
"""Architectures that load weights from subfolders or from other repositories, too."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where vLLM loads a model from, as its configuration says. `private`: why that cannot be identified, or ""."""

    model: str
    revision: str | None
    download_dir: str | None
    private: str = ""
    runs_code: bool = False
    """Python files of the model's folder are run (trust_remote_code): they decide the numbers as its weights do."""


def weight_sources(vllm_config: Any) -> tuple[WeightSource, ...]:
    """The model, and the draft model if that has KV of its own in the cache and other files."""
    main = vllm_config.model_config
    found = [_source(main, vllm_config.load_config)]
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.uses_draft_kv_cache():
        draft = speculative.draft_model_config
        if draft is not None and (draft.model, draft.revision) != (main.model, main.revision):
            found.append(_source(draft, speculative.draft_load_config or vllm_config.load_config))
    return tuple(found)


def _source(model: Any, load: Any) -> WeightSource:
    name = str(model.model)
    code = _code(model)
    private = _remote(model, str(load.load_format)) or next((f"its code comes from {c}" for c in code if "--" in c), "")
    return WeightSource(name, model.revision, load.download_dir, private, bool(code))


def _code(model: Any) -> list[str]:
    """What of a model's folder is run: `file.Class`, or `ORG/NAME--file.Class` of another repository."""
    names = (getattr(model.hf_config, "auto_map", None) or {}) if model.trust_remote_code else {}
    return [str(one) for found in names.values() for one in (found if isinstance(found, list | tuple) else [found])]


def _remote(model: Any, load_format: str) -> str:
    """Why these weights are not the weight files of a folder, or ""."""
    if load_format == "dummy":
        return "load_format 'dummy' makes the weights up"
    if load_format not in _FROM_FILES:
        return f"load_format {load_format!r} does not read weight files that lmkv could compare"
    if model.model_weights or "://" in str(model.model):
        return f"the weights come from {model.model_weights or model.model}, not from files on this host"
    elsewhere = _ELSEWHERE.intersection(model.architectures or ())
    return f"{min(elsewhere)} loads weights from other folders as well" if elsewhere else ""


@dataclass(frozen=True, slots=True)
class Weights:
    """The digest of all sources, or why there is none."""

    digest: str
    private: str = ""


def identify(
    sources: tuple[WeightSource, ...], environ: Mapping[str, str], loaded_s: float, cache: Path | None
) -> Weights:
    """Read the weight files of `sources`. `loaded_s`: when vLLM had loaded them, seconds since the epoch.

    Takes as long as reading the files does, unless their digests are in `cache`. Raises ConfigError for files that
    cannot be read.
    """
    digests = []
    for source in sources:
        try:
            found = Weights("", source.private) if source.private else _read(source, environ, loaded_s, cache)
        except OSError as error:
            raise ConfigError(
                f"the weights of {source.model} cannot be read: {error}", hint="check the model folder"
            ) from error
        if found.private:
            return found
        digests.append(found.digest)
    return Weights("+".join(digests))


def _read(source: WeightSource, environ: Mapping[str, str], loaded_s: float, cache: Path | None) -> Weights:
    modelscope = environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
    located = locate(source.model, source.revision, environ, source.download_dir)
    if located is None or (located.hub and modelscope):
        return Weights(
            "",
            f"{source.model!r} is no folder on this host, and its revision {source.revision or 'main'!r} is not in the "
            "Hugging Face cache",
        )
    digest = weights_digest(located.path, cache)
    if not digest:
        return Weights("", f"{located.path} has no weight files")
    # What is newer than the process may not be what it has loaded. A snapshot's blobs never change under their name,
    # so those may have been downloaded by this very start.
    limit_s = loaded_s if located.hub else process_start_s()
    files = weight_files(located.path)
    if source.runs_code and located.path.is_dir():
        files += sorted(located.path.glob("*.py"))
    if newest_s(files) >= limit_s:
        return Weights("", f"the weight files in {located.path} are newer than what this engine has loaded")
    if located.pointer is not None and newest_s([located.pointer]) >= process_start_s():
        return Weights("", f"{located.pointer} has changed since this engine started")
    return Weights(f"{digest}+{_code_digest(files)}" if source.runs_code else digest)


def _code_digest(files: list[Path]) -> str:
    """16 hex digits over names and contents of the Python files among these."""
    state = hashlib.blake2b(digest_size=8)
    for file in files:
        if file.suffix == ".py":
            state.update(f"{file.name}:{file_digest(file, None)};".encode())
    return state.hexdigest()


class WeightsName:
    """The name of this engine's weights through its life. Not thread-safe.

    `on_reset`: what a reset of the prefix cache means. `new_epoch`, `external`: the weights may be others, known to
    nobody. `count`: the same others on every engine that has been reset as often. `keep`: nothing.
    """

    def __init__(self, incarnation: Incarnation, on_reset: str) -> None:
        self._incarnation = incarnation
        self._on_reset = on_reset
        self._weights: Weights | None = None
        self._resets = 0

    def known(self, weights: Weights) -> None:
        self._weights = weights

    def reset(self) -> bool:
        """The prefix cache was reset. True: the weights have another name from now on."""
        self._resets += self._on_reset != "keep"
        return self._on_reset != "keep"

    @property
    def private(self) -> str:
        """Why this engine's KV is its own alone, or ""."""
        if self._weights is None or self._weights.private:
            return self._weights.private if self._weights else ""
        if self._resets and self._on_reset != "count":
            return f"the prefix cache was reset {self._resets} times, the weights may have been replaced"
        return ""

    @property
    def value(self) -> str:
        """What engines that exchange KV directly have to agree on."""
        assert self._weights is not None, "the weights have been identified"
        resets = f"+{self._resets}" if self._resets else ""
        if self.private:
            return f"{PRIVATE} to {self._incarnation}{resets} ({self.private})"
        return self._weights.digest + resets

    @property
    def since_reset(self) -> str:
        """What tells KV from that before the last reset, and from that of engines with other weights; "" before."""
        return (str(self._resets) if self._on_reset == "count" else self.epoch) if self._resets else ""

    @property
    def epoch(self) -> str:
        """Part of the namespace in the pool, where pages outlive engines: a count of resets would come again."""
        if self._resets or self.private:
            return f"{self._incarnation}-{self._resets}"
        return ""
