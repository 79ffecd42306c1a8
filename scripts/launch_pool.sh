#!/usr/bin/env bash
# Starts a pool node: lmkv pool with the same options; --help tells them.
set -uo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
exec "${LMKV_PYTHON:-${LMKV_VENV:-$root/.venv}/bin/python}" -c 'from lmkv.cli import main; main()' pool "$@"
