"""Variables of the scripts and of the build are known to the engine's settings, and cannot drift from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmkv.config import ConnectorSettings, connector_settings
from lmkv.errors import ConfigError
from lmkv.settings import OTHER_VARIABLES, SCRIPT_VARIABLES, is_others

ROOT = Path(__file__).resolve().parents[2]
OURS = {f"LMKV_{name.upper()}" for name in ConnectorSettings.model_fields}
READ = re.compile(r"(?:\$\{?|environ(?:\.get\(|\[)\"|getenv\(\"|^\s*#\s+)(LMKV_[A-Z][A-Z0-9_]*)(?![A-Z0-9_*])", re.M)
"""A variable where a file reads it: in a shell or compose file, in Python, or in the table of _launch.sh."""


def read_variables() -> dict[str, str]:
    """Every LMKV_* variable that scripts, images, tests or the build read: name → file."""
    files = [*(ROOT / "scripts").rglob("*"), *(ROOT / "docker").rglob("*"), ROOT / "Makefile"]
    files += [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__).resolve()]
    found: dict[str, str] = {}
    for path in files:
        if path.is_file() and path.suffix not in (".pyc", ".txt"):
            found |= dict.fromkeys(READ.findall(path.read_text()), path.name)
    return found


def launch_script_variables() -> set[str]:
    text = (ROOT / "scripts" / "_launch.sh").read_text()
    listed = re.search(r"^LMKV_SCRIPT_VARIABLES=\(([^)]*)\)", text, re.M)
    assert listed is not None
    return set(listed[1].split())


def test_the_search_finds_what_it_should() -> None:
    found = read_variables()
    assert {"LMKV_START_TIMEOUT_S", "LMKV_CORES", "LMKV_CHAOS_ROUNDS", "LMKV_PREFILL_GPU"} <= found.keys()


def test_every_variable_that_is_read_is_known() -> None:
    unknown = {name: file for name, file in read_variables().items() if name not in OURS and not is_others(name)}
    unknown.pop("LMKV_SCRIPT_VARIABLES", None)  # the array of _launch.sh
    assert not unknown, f"add them to lmkv/settings.py: {unknown}"


def test_the_launch_script_takes_out_what_settings_say() -> None:
    assert launch_script_variables() == set(SCRIPT_VARIABLES) | {"LMKV_LISTEN", "LMKV_NAME", "LMKV_TRANSPORT"}


@pytest.mark.parametrize("variable", sorted(OTHER_VARIABLES))
def test_an_engine_started_by_hand_is_not_refused_for_them(variable: str) -> None:
    assert connector_settings({}, {variable: "1"}) == ConnectorSettings()


@pytest.mark.parametrize("variable", ["LMKV_START_TIMEOUT", "LMKV_CORESX", "LMKV_MODELSDIR"])
def test_a_misspelt_one_is_still_an_error(variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        connector_settings({}, {variable: "1"})
