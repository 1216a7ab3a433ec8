#!/usr/bin/env bash
# The stages of run_pre_training_e2e.sh with a small model, on a laptop within 10 minutes; --offline needs no network.
#
#   scripts/run_pre_training_e2e_debug.sh --offline [--work-dir temp_data]
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
exec "$here/pipeline.sh" "${SETTINGS:-$here/debug.yaml}" "$@"
