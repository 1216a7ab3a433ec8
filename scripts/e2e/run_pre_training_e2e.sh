#!/usr/bin/env bash
# Pretrain and release LF_LLM-269M: download, tokenize, train, evaluate, export. Start it again to continue.
#
#   scripts/run_pre_training_e2e.sh [--work-dir temp_data] [--set KEY=VALUE ...] [--dry-run]
#
# All settings are in lf_llm_269m.yaml, or in the file that SETTINGS names; --help lists the flags.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
exec "$here/pipeline.sh" "${SETTINGS:-$here/lf_llm_269m.yaml}" "$@"
