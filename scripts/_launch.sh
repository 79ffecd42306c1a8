# shellcheck shell=bash
# Sourced by launch_prefill.sh, launch_decode.sh, launch_engine.sh and launch_plain.sh: one way to start, warm and end a vLLM engine.
#
# The engine runs in a session of its own. SIGTERM, SIGINT or SIGHUP to the script ends the engine and everything it
# started; if the script itself is killed, the kernel ends the engine (parent-death signal). A second signal kills.
#
# Variables of the scripts (all optional; the engine does not see them):
#   LMKV_VENV             virtual environment                               default: .venv
#   LMKV_PYTHON           interpreter to start the engine with                default: $LMKV_VENV/bin/python
#   LMKV_MODELS           where the models lie                                default: models/
#   LMKV_CORES            CPU cores of the engine, e.g. 0 or 0-3 (taskset)    default: as the machine gives
#   LMKV_READY_FILE       created when the engine is ready; holds the READY line
#   LMKV_START_TIMEOUT_S  the engine has to be ready after this               default: 1800
#   LMKV_STOP_TIMEOUT_S   an engine that has not ended by then is killed      default: 20
# LMKV_LISTEN, LMKV_NAME and LMKV_TRANSPORT are folded into the connector's settings (an option wins over a variable);
# every other LMKV_* variable goes to the connector as it is. The engine's API server gets LMKV_HEALTH: whom it asks
# whether lmkv lives (lmkv/vllm/health.py).

LMKV_SCRIPT_VARIABLES=(LMKV_VENV LMKV_PYTHON LMKV_MODELS LMKV_CORES LMKV_READY_FILE LMKV_START_TIMEOUT_S
  LMKV_STOP_TIMEOUT_S LMKV_SETUP LMKV_LISTEN LMKV_NAME LMKV_TRANSPORT)

lmkv_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
lmkv_me=$(basename -- "$0")

lmkv_fail() {
  printf '%s: %s\n' "$lmkv_me" "$1" >&2
  exit "${2:-1}"
}

lmkv_usage() {
  local role=$1 port=$2
  printf 'Usage: %s [options] [vLLM options]\n\n' "$lmkv_me"
  if [[ $role == plain ]]; then
    printf 'Starts a vLLM engine without lmkv, for comparisons.\n\n'
  elif [[ $role == engine ]]; then
    printf 'Starts a vLLM engine with the lmkv connector, that computes and decodes, and shares KV through the pool.\n\n'
  else
    printf 'Starts a vLLM %s engine with the lmkv connector.\n\n' "$role"
  fi
  cat <<END
  --model DIR          model folder or hub name      (default: models/SmolLM2-135M-Instruct)
  --host HOST          HTTP address                  (default: 127.0.0.1)
  --port PORT          HTTP port                     (default: $port)
END
  if [[ $role != plain ]]; then
    cat <<END
  --name NAME          name in logs and ledgers      (default: $role-PORT)
  --lmkv-listen URL    control address, tcp://H:P    (default: tcp://HOST:PORT+10000)
  --lmkv-transport URL data plane                    (default: nixl://)
  --kv-verify POLICY   checksums that decode demands (default: auto; off, sample, full)
  --pool ADDRESS       pool node, tcp://HOST:PORT; repeatable
  --controller ADDRESS controller, tcp://HOST:PORT; repeatable
END
  fi
  cat <<END
  -h, --help           this text

Anything else goes to vLLM as it is, and wins over what this script sets.
The engine's log goes to stderr. When the engine is warm, stdout gets one line:
  READY $role http://HOST:PORT$([[ $role == plain ]] || printf ' control tcp://HOST:PORT')
Variables: LMKV_CORES, LMKV_READY_FILE, LMKV_MODELS, …: see scripts/_launch.sh.
END
}

# Reads the command line into the variables of lmkv_launch.
lmkv_parse() {
  while (($#)); do
    local option=$1 value=""
    case $option in
      -h | --help)
        lmkv_usage "$role" "$port"
        exit 0
        ;;
      --model | --host | --port | --name | --lmkv-listen | --lmkv-transport | --kv-verify | --pool | --controller)
        (($# >= 2)) || lmkv_fail "$option needs a value · see --help" 2
        value=$2
        shift 2
        ;;
      --model=* | --host=* | --port=* | --name=* | --lmkv-listen=* | --lmkv-transport=* | --kv-verify=* | --pool=* | --controller=*)
        value=${option#*=}
        option=${option%%=*}
        shift
        ;;
      *)
        passed+=("$option")
        shift
        continue
        ;;
    esac
    case $option in
      --model) model=$value ;;
      --host) host=$value ;;
      --port) port=$value ;;
      --name) name=$value ;;
      --lmkv-listen) listen=$value ;;
      --lmkv-transport) transport=$value ;;
      --kv-verify) kv_verify=$value ;;
      --pool) pools+=("$value") ;;
      --controller) controllers+=("$value") ;;
    esac
  done
}

lmkv_check() {
  if ! [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then
    lmkv_fail "--port is '$port' · give a number from 1 to 65535" 2
  fi
  name=${name:-$role-$port}
  [[ $name =~ ^[A-Za-z0-9._-]+$ ]] || lmkv_fail "--name is '$name' · use letters, digits and . _ - only" 2
  if [[ -z $listen ]]; then
    ((port <= 55535)) || [[ $role == plain ]] ||
      lmkv_fail "control port $((port + 10000)) is above 65535 · give one with --lmkv-listen tcp://HOST:PORT" 2
    listen=tcp://$host:$((port + 10000))
  fi
  [[ $listen =~ ^tcp://([][A-Za-z0-9.:_-]+):([0-9]+)$ ]] ||
    lmkv_fail "--lmkv-listen is '$listen' · write tcp://HOST:PORT" 2
  local control_host=${BASH_REMATCH[1]} control_port=${BASH_REMATCH[2]}
  [[ $transport =~ ^[a-z]+://[A-Za-z0-9.:/?=\&_-]*$ ]] ||
    lmkv_fail "--lmkv-transport is '$transport' · write SCHEME://, e.g. nixl://" 2
  [[ -x $(command -v -- "$python") ]] || lmkv_fail "no Python at $python · run 'make setup' or set LMKV_PYTHON" 1
  if [[ ! -d $model && ($model == /* || $model == .* || $model == models/* || $model == "$default_model") ]]; then
    lmkv_fail "no model at $model · run scripts/fetch_model.py or give --model DIR" 1
  fi
  lmkv_port_is_free "$host" "$port" --port
  [[ $role == plain || $control_port == 0 ]] || lmkv_port_is_free "$control_host" "$control_port" --lmkv-listen
}

# A listener answers on the port: say so before vLLM spends a minute on loading.
lmkv_port_is_free() {
  local where=$1
  [[ $where == 0.0.0.0 || $where == '*' ]] && where=127.0.0.1
  if (exec 3<>"/dev/tcp/$where/$2") 2>/dev/null; then
    local who=""
    who=$(ss -Hltnp "sport = :$2" 2>/dev/null | sed -n 's/.*users:((\(.*\))).*/ (\1)/p' | head -n 1) || true
    lmkv_fail "port $2 on $1 is taken$who · stop what listens there, or choose another with $3" 3
  fi
}

# Variables that vLLM on a CPU needs; what the user has set stays.
lmkv_cpu() {
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
  [[ -z ${LMKV_CORES:-} ]] || export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-$LMKV_CORES}
  engine+=(--dtype bfloat16 --max-model-len 4096 --enforce-eager)
}

lmkv_engine_command() {
  # The build of vLLM that is installed decides, not the hardware: vllm-cpu on a GPU host still runs on the CPU.
  local device
  device=$("$python" -c 'import importlib.metadata as m; print(
    "cpu" if any((d.name or "").lower() == "vllm-cpu" for d in m.distributions()) else "gpu")') ||
    lmkv_fail "$python does not run · run 'make setup' or set LMKV_PYTHON" 1
  export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
  [[ -z ${LMKV_CORES:-} ]] || engine+=(taskset -c "$LMKV_CORES")
  engine+=("$python" -m vllm.entrypoints.openai.api_server --model "$model" --host "$host" --port "$port")
  if [[ -d $model ]]; then
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
    engine+=(--served-model-name "$(basename -- "$(cd -- "$model" && pwd)")")
  fi
  [[ $device != cpu ]] || lmkv_cpu
  [[ $role == plain ]] || engine+=(--kv-transfer-config "$(lmkv_connector)" --middleware lmkv.vllm.health.Health)
  engine+=("${passed[@]}")
}

# Prints where the engine answers, for LMKV_HEALTH: with data parallelism, rank r of this host does on the port plus r.
# Nothing, if that is not known: port 0, another --kv-transfer-config, or an API server for each rank (vLLM's supervisor
# of those ends them all when /health of one fails).
lmkv_health() {
  local base=${listen##*:} first=0 size=1 here="" i word value rank found=()
  ((base > 0)) || return 0
  for ((i = 0; i < ${#passed[@]}; i++)); do
    word=${passed[i]%%=*}
    [[ ${passed[i]} == *=* ]] && value=${passed[i]#*=} || value=${passed[i + 1]:-}
    [[ $word != --* ]] || word=${word//_/-}
    case $word in
      --kv-transfer-config | --data-parallel-multi-port-external-lb) return 0 ;;
      --data-parallel-size | -dp | --data-parallel-size-local | -dpl) ;;
      --data-parallel-start-rank | -dpr | --data-parallel-rank | -dpn) ;;
      *) continue ;;
    esac
    [[ $value =~ ^(0|[1-9][0-9]{0,4})$ ]] || continue # vLLM will say what is wrong with it
    case $word in
      --data-parallel-size | -dp) size=$value ;;
      --data-parallel-size-local | -dpl) here=$value ;;
      --data-parallel-rank | -dpn) first=$value here=1 ;;
      *) first=$value ;;
    esac
  done
  for ((rank = first; rank < first + ${here:-$((size - first))}; rank++)); do
    found+=("${listen%:*}:$((base + rank))")
  done
  lmkv_join "${found[@]}"
}

lmkv_join() {
  local IFS=,
  printf '%s' "$*"
}

lmkv_connector() {
  local kv_role=kv_both
  [[ $role != prefill ]] || kv_role=kv_producer
  [[ $role != decode ]] || kv_role=kv_consumer
  printf '{"kv_connector":"LmkvConnector","kv_connector_module_path":"lmkv.vllm.connector","kv_role":"%s",' "$kv_role"
  printf '"kv_load_failure_policy":"recompute",'
  printf '"kv_connector_extra_config":{"listen":"%s","name":"%s","transport":"%s"' "$listen" "$name" "$transport"
  # Given here they replace LMKV_POOL and LMKV_CONTROLLER, which the connector would otherwise read itself.
  ((${#pools[@]} == 0)) || printf ',"pool":"%s"' "$(lmkv_join "${pools[@]}")"
  ((${#controllers[@]} == 0)) || printf ',"controller":"%s"' "$(lmkv_join "${controllers[@]}")"
  [[ -z $kv_verify ]] || printf ',"kv_verify":"%s"' "$kv_verify"
  printf '}}'
}

# Ends the engine's session: politely, then, after LMKV_STOP_TIMEOUT_S, by force. Nothing of it is left afterwards.
lmkv_stop() {
  trap 'kill -KILL -- "-$engine_pid" 2>/dev/null' TERM INT HUP
  [[ -z $warm_pid ]] || kill -TERM "$warm_pid" 2>/dev/null
  if [[ -n $engine_pid ]]; then
    kill -TERM "$engine_pid" 2>/dev/null
    local give_up=$((SECONDS + stop_timeout_s))
    while lmkv_session_lives "$engine_pid" && ((SECONDS < give_up)); do sleep 0.1; done
    kill -KILL -- "-$engine_pid" 2>/dev/null
    wait "$engine_pid" 2>/dev/null
  fi
  [[ -z $ready_file ]] || rm -f -- "$ready_file"
}

# True while a process of session $1 runs; zombies, which a container's PID 1 may never reap, don't count.
lmkv_session_lives() {
  local file line fields
  for file in /proc/[0-9]*/stat; do
    { read -r line <"$file"; } 2>/dev/null || continue
    read -ra fields <<<"${line##*) }"
    [[ ${fields[3]} != "$1" || ${fields[0]} == [ZX] ]] || return 0
  done
  return 1
}

lmkv_signalled() {
  lmkv_stop
  exit $((128 + $1))
}

lmkv_launch() {
  local role=$1 host=127.0.0.1 port=8100 model="" name=${LMKV_NAME:-} listen=${LMKV_LISTEN:-}
  local transport=${LMKV_TRANSPORT:-nixl://} engine_pid="" warm_pid="" passed=() engine=() last
  local default_model=${LMKV_MODELS:-$lmkv_root/models}/SmolLM2-135M-Instruct
  local python=${LMKV_PYTHON:-${LMKV_VENV:-$lmkv_root/.venv}/bin/python}
  local ready_file=${LMKV_READY_FILE:-} pools=() controllers=() kv_verify="" health=""
  local stop_timeout_s=${LMKV_STOP_TIMEOUT_S:-20} start_timeout_s=${LMKV_START_TIMEOUT_S:-1800}
  [[ $role != decode ]] || port=8200
  [[ $role != engine ]] || port=8000
  [[ $role != plain ]] || port=8000
  model=$default_model
  shift
  lmkv_parse "$@"
  lmkv_check
  lmkv_engine_command
  [[ -z $ready_file ]] || rm -f -- "$ready_file"
  last="READY $role http://$host:$port"
  [[ $role == plain ]] || last+=" control $listen"
  unset "${LMKV_SCRIPT_VARIABLES[@]}" LMKV_HEALTH
  [[ $role == plain ]] || health=$(lmkv_health)
  [[ -z $health ]] || export LMKV_HEALTH=$health
  ((${#pools[@]} == 0)) || unset LMKV_POOL
  ((${#controllers[@]} == 0)) || unset LMKV_CONTROLLER
  [[ -z $kv_verify ]] || unset LMKV_KV_VERIFY

  trap 'lmkv_signalled 15' TERM
  trap 'lmkv_signalled 2' INT
  trap 'lmkv_signalled 1' HUP
  local tied=()
  ! command -v setpriv >/dev/null || tied=(setpriv --pdeathsig TERM)
  "${tied[@]}" setsid "${engine[@]}" </dev/null 1>&2 &
  engine_pid=$!
  "$python" "$lmkv_root/scripts/_warm_up.py" --url "http://$host:$port" --pid "$engine_pid" \
    --timeout "$start_timeout_s" --ready-file "$ready_file" --line "$last" </dev/null &
  warm_pid=$!
  lmkv_wait
}

# Until the engine ends; the script's exit status is the engine's.
lmkv_wait() {
  local status=0
  wait "$warm_pid" || status=$?
  warm_pid=""
  if ((status != 0)) && kill -0 "$engine_pid" 2>/dev/null; then
    lmkv_stop
    exit "$status"
  fi
  status=0
  wait "$engine_pid" || status=$?
  lmkv_stop
  ((status == 0)) || lmkv_fail "the engine ended with status $status · its log above says why" "$status"
  exit 0
}
