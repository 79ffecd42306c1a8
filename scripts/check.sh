#!/usr/bin/env bash
# Every check that reads the code without running it. All are run; the ones that failed are named at the end.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
bin=${LMKV_VENV:-.venv}/bin
PATH=$bin:$PATH
failed=()

check() {
  local title=$1 said
  shift
  if said=$("$@" 2>&1); then
    printf '  ✓ %s\n' "$title"
  else
    printf '  ✗ %s: %s\n' "$title" "$*"
    printf '%s\n' "$said" | tail -n 60 | sed 's/^/      /'
    failed+=("$title")
  fi
}

# What git knows or would add, so that models, caches and environments stay out.
tracked() {
  local file
  git ls-files --cached --others --exclude-standard -- "$@" | while read -r file; do
    [[ ! -f $file ]] || printf '%s\n' "$file"
  done
}

scripts_typed() { MYPYPATH=scripts:docker mypy --strict --python-version 3.11 scripts/*.py docker/*.py; }

spelling() { tracked . | xargs -r -d '\n' codespell; }

# Whoever clones this has other folders than the author: a path into somebody's home or work folder is a bug.
no_machine_paths() {
  local found
  found=$(tracked . | xargs -r -d '\n' grep -nIE '(^|[^A-Za-z0-9_.$}/-])/(work|home|root|Users|mnt)/[A-Za-z0-9_.]' --) || return 0
  printf '%s\n' "$found"
  return 1
}

cxx_format() { tracked csrc | grep -E '\.(h|cpp|cu)$' | xargs -r -d '\n' clang-format --dry-run --Werror; }

short_files() {
  local found
  found=$(tracked '*.py' '*.sh' | xargs -r -d '\n' wc -l | awk '$2 != "total" && $1 > 400')
  [[ -z $found ]] || { printf 'more than 400 lines:\n%s\n' "$found" && return 1; }
}

[[ -x $bin/ruff ]] || { printf "check.sh: no %s/ruff · run 'make setup'\n" "$bin" >&2 && exit 1; }
mapfile -t shell < <(tracked 'scripts/*.sh' '.ci/run')
mapfile -t yaml < <(tracked '*.yaml' '*.yml')
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "mypy of the scripts" scripts_typed
check "import floors" lint-imports
check "codespell" spelling
check "shellcheck" shellcheck -x "${shell[@]}"
check "hadolint" hadolint docker/Dockerfile
((${#yaml[@]} == 0)) || check "yamllint" yamllint --strict "${yaml[@]}"
check "clang-format" cxx_format
check "no machine paths" no_machine_paths
check "short files" short_files
if ((${#failed[@]})); then
  printf 'failed: %s\n' "$(IFS=, && echo "${failed[*]}")"
  exit 1
fi
