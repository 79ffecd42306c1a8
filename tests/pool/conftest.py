"""Hypothesis profiles as in tests/protocol: `ci` is deterministic and quick; `HYPOTHESIS_PROFILE=soak` searches on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.pool.bed import NodeThread, User

COMMON = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.register_profile("ci", COMMON, derandomize=True)
settings.register_profile("soak", COMMON, max_examples=4000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeThread]:
    found = NodeThread(tmp_path)
    yield found
    found.end()


@pytest.fixture
def user(node: NodeThread) -> Iterator[User]:
    found = User(node.address)
    yield found
    found.close()
