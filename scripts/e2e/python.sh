# Sourced by the scripts of this folder. Set `root`, this checkout, and `python`: PYTHON, the active environment, or that
# of `make install`; and export PYTHONPATH.
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
python=${PYTHON:-python}
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${PYTHON:-}" ] && ! "$python" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("torch"))'; then
    echo "$0: $python cannot import torch; run \`make install\`, or set PYTHON to an environment with this package" >&2
    exit 2
fi
