#!/usr/bin/env bash
# run.sh FLAGS…: the benchmark on the hosts of hosts.txt, or on this machine where there is no such file.
# HOSTS: another hosts file. NPROC: ranks on each host; default: one for each GPU. PYTHON: the interpreter.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
launch=("${PYTHON:-python}" "$here/../launch.py" --nproc-per-node "${NPROC:-gpu}")
if [[ -n ${HOSTS:-} || -e $here/hosts.txt ]]; then
    launch+=(--hosts "${HOSTS:-$here/hosts.txt}")
fi
exec "${launch[@]}" "$here/benchmark.py" "$@"
