#!/usr/bin/env bash
# Check and measure on a GPU what only a GPU can show, in half an hour on one device.
#
#   scripts/checks/first_gpu_half_hour.sh FOLDER           writes results.json and results.md to FOLDER
#   scripts/checks/first_gpu_half_hour.sh FOLDER --cpu     the same steps with tiny models on a CPU
#
# All options: --help. A step that fails does not stop the others.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$here:$here/scripts/bench:$here/scripts/checks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" "$here/scripts/checks/first_gpu_half_hour.py" "$@"
