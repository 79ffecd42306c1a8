#!/usr/bin/env bash
# The demo from nothing: environment, model, then scripts/demo.py. Options: --help.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=${LMKV_VENV:-$here/../.venv}
for option in "$@"; do
  [[ $option != -h && $option != --help ]] || exec python3 "$here/demo.py" --help
done
LMKV_VENV=$venv "$here/setup.sh"
"$venv/bin/python" "$here/fetch_model.py" smollm2
exec "$venv/bin/python" "$here/demo.py" "$@"
