#!/usr/bin/env bash
# Makes .venv-ucx, in which the ucx:// back end can be tested. A second run with nothing to do takes no time.
#
# It is a venv of its own because ucxx and NIXL exclude each other; lmkv itself is not installed there but found through
# a path file, so it always is the working tree's. An installation that wants ucx:// says: pip install 'lmkv[ucx]'
# 'libucx-cu12<1.22' (newer ones of the two do not fit together).
#
#   LMKV_UCX_VENV=DIR     where to (default: .venv-ucx)
#   LMKV_PYTHON=PYTHON    interpreter to make it from (default: the one of .venv, else python3)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

venv=${LMKV_UCX_VENV:-.venv-ucx}
stamp=$venv/.lmkv-setup
python=${LMKV_PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi

fail() {
  printf 'setup_ucx.sh: %s\n' "$1" >&2
  exit 1
}

wanted="$PWD $(sha256sum <scripts/setup_ucx.sh | cut -d' ' -f1)"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c 'import lmkv.transport' 2>/dev/null; then
  exit 0
fi

"$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "$python is no Python 3.11 or newer with venv and pip · set LMKV_PYTHON"

rm -f -- "$stamp"
printf '  … making %s\n' "$venv" >&2
"$python" -m venv --clear -- "$venv"
# Keeps git, and what asks git, out of it.
printf '*\n' >"$venv/.gitignore"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'ucxx-cu12==0.52.*' 'libucx-cu12<1.22' 'numpy>=1.26' 'msgspec>=0.19' 'xxhash>=3.4' \
  pytest pytest-asyncio pytest-timeout hypothesis >"$venv/setup.log" 2>&1 ||
  fail "the packages cannot be installed · the end of $venv/setup.log: $(tail -n 3 "$venv/setup.log")"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$PWD" >"$site/lmkv-working-tree.pth"
"$venv/bin/python" -c 'import lmkv.transport.ucx' 2>>"$venv/setup.log" ||
  fail "ucxx was installed but does not load · the end of $venv/setup.log: $(tail -n 3 "$venv/setup.log")"
printf '%s' "$wanted" >"$stamp"
printf '  ✓ %s\n' "$venv" >&2
