#!/usr/bin/env bash
# Matrices and vocabulary split over TENSOR ranks of a host (default: 8), the parts sharded over the others.
exec bash "$(dirname "$0")/run.sh" --fsdp --fsdp-amp --tensor-parallel "${TENSOR:-8}" "$@"
