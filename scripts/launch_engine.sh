#!/usr/bin/env bash
# Starts a vLLM engine that shares KV through the pool; --help tells the options. SIGTERM or Ctrl-C ends it and all
# it started.
set -uo pipefail
# shellcheck source=scripts/_launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_launch.sh"
lmkv_launch engine "$@"
