#!/usr/bin/env bash
# Weight files into model/; see `./download_weights.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python="${VIRTUAL_ENV:-${CONDA_PREFIX:-.venv}}/bin/python"
if [[ ! -x "$python" ]]; then
    echo "download_weights.sh: error: there is no $python: run ./init.sh first" >&2
    exit 2
fi
exec "$python" -m upsnet download-weights "$@"
