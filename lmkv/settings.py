"""What the settings of all processes have in common: where they come from, and how mistakes in them are told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from .errors import ConfigError

SCRIPT_VARIABLES = (
    "LMKV_VENV",
    "LMKV_PYTHON",
    "LMKV_MODELS",
    "LMKV_CORES",
    "LMKV_READY_FILE",
    "LMKV_START_TIMEOUT_S",
    "LMKV_STOP_TIMEOUT_S",
    "LMKV_SETUP",
)
"""Variables that the launch scripts read (`scripts/_launch.sh` takes them out of the engine's environment)."""
OTHER_VARIABLES = frozenset(
    (
        *SCRIPT_VARIABLES,
        *("LMKV_CUDA", "LMKV_DEVICE_COMPILER", "LMKV_TORCH_DIR", "LMKV_SHIM"),
        *("LMKV_UCX_PYTHON", "LMKV_UCX_VENV"),
        "LMKV_HEALTH",
        *("LMKV_MODEL", "LMKV_MODELS_DIR", "LMKV_ENGINE_ARGS", "LMKV_PUBLISH", "LMKV_SHM", "LMKV_DISK_CAPACITY"),
        *("LMKV_PREFILL_CORES", "LMKV_PREFILL_GPU", "LMKV_DECODE_CORES", "LMKV_DECODE_GPU"),
        *("LMKV_CHAOS_ROUNDS", "LMKV_CHAOS_SEED", "LMKV_STORMS", "LMKV_GOODPUT"),
    )
)
"""Variables of the scripts, the API server (`lmkv.vllm.health`), the build, the compose file and the tests. An engine
that finds them in its environment leaves them alone."""
OTHER_PREFIXES = ("LMKV_ROUTER_", "LMKV_POOL_", "LMKV_UP_")
"""Settings of other processes begin so. Where such a name is also one of the engine's (LMKV_POOL_LOAD), the engine
reads it."""


def is_others(variable: str) -> bool:
    """A variable that an engine's settings need not know."""
    return variable in OTHER_VARIABLES or variable.startswith(OTHER_PREFIXES)


class CommandSettings(BaseSettings):
    """Of a process that is started by a command: what stands on the command line wins over the environment."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def split_list(value: Any) -> Any:
    """A list as it stands in the environment, separated by commas; anything else as it is."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def refuse_unknown(environ: Iterable[str], prefix: str, known: set[str], whose: str, command: str, code: str) -> None:
    """Raise ConfigError for a variable that begins with `prefix` and is no setting."""
    for variable in environ:
        if variable.startswith(prefix) and variable not in known:
            near = difflib.get_close_matches(variable, sorted(known), n=1)
            raise ConfigError(
                f"environment variable {variable!r} is no setting of {whose}",
                hint=f"did you mean {near[0]!r}?" if near else f"remove it, or see {command} --help",
                code=code,
            )


def wrong_value(error: ValidationError, prefix: str) -> ConfigError:
    """The first mistake: which setting, which value, what to correct."""
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    return ConfigError(
        f"setting {name!r} has the value {problem.get('input')!r}: {problem['msg']}",
        hint=f"correct --{name.replace('_', '-')} or {prefix}{name.upper()}",
    )
