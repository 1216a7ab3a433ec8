#!/usr/bin/env bash
# run.sh FLAGS...: run the benchmark on the hosts of hosts.txt, or on this machine if that file does not exist.
# HOSTS: another hosts file. NPROC: ranks per host (default: one per GPU). PYTHON: the interpreter.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
launch=("${PYTHON:-python}" "$here/../launch.py" --nproc-per-node "${NPROC:-gpu}")
if [[ -n ${HOSTS:-} || -e $here/hosts.txt ]]; then
    launch+=(--hosts "${HOSTS:-$here/hosts.txt}")
fi
exec "${launch[@]}" "$here/benchmark.py" "$@"
