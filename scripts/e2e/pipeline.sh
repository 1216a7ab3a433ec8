#!/usr/bin/env bash
# Start pipeline.py with this checkout: PYTHON, the active environment, or the one of `make install`.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
source "$here/python.sh"
exec "$python" "$here/pipeline.py" "$@"
