#!/usr/bin/env bash
# OpenLM's 1B model from raw text to a release, on several machines. A recipe: read open_lm_1b.yaml first.
#
#   scripts/e2e/open_lm_1b.sh --dry-run                          # print every command, write nothing
#   scripts/e2e/open_lm_1b.sh --work-dir /shared/1b --until plan # what the planner says about your machines
#   scripts/e2e/open_lm_1b.sh --work-dir /shared/1b              # hosts.txt lists the machines
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
exec "$here/pipeline.sh" "${SETTINGS:-$here/open_lm_1b.yaml}" "$@"
