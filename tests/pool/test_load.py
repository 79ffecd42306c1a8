"""Ten engines' worth of clients on one node whose arena is far smaller than what they ask for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.pool.bed import ROOT, NodeProcess, User, using

CLIENTS = 10
SECONDS = 2.5


@pytest.mark.parametrize(("plane", "policy"), [("", "s3fifo"), ("tcp://127.0.0.1", "lru")], ids=["mapped", "tcp"])
def test_ten_clients(tmp_path: Path, plane: str, policy: str) -> None:
    node = NodeProcess(tmp_path, capacity="4MiB", policy=policy, transport=plane or "none")
    user = User(node.address)
    clients = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pool.load_client", node.address, plane, str(seed), str(SECONDS), "300"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(CLIENTS)
    ]
    did: Counter[str] = Counter()
    try:
        for client in clients:
            told, _ = client.communicate(timeout=60)
            assert client.returncode == 0
            did.update(json.loads(told))
    finally:
        for client in clients:
            client.kill()
    with using(node, user):
        print(f"{plane or 'mapped'}: {dict(did)}")
        operations = did["pins"] + did["reserves"] + did["commits"]
        print(f"{operations / SECONDS:.0f} questions/s, {did['bytes'] / SECONDS / 1e6:.0f} MB/s read and checked")
        assert did["wrong"] == 0
        assert min(did["hits"], did["misses"], did["stored"], did["abandoned"]) > 0
        stats = user.until_stats(lambda s: not s["leases"] and not s["reserved"] and len(s["clients"]) == 1)
        assert stats["quarantined_bytes"] == stats["pinned_bytes"] == stats["waiting"] == 0
        assert stats["counters"]["evicted"] > 100, "the arena was too small for all"
        assert stats["counters"].get("unreadable", 0) == stats["counters"].get("corrupt", 0) == 0
        user.drop()
        user.drop(space=b"")
        assert user.stats()["used_bytes"] == 0
