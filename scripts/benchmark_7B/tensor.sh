#!/usr/bin/env bash
# Matrices and vocabulary split over TENSOR ranks of a host (default: 8), then sharded over the other ranks.
exec bash "$(dirname "$0")/run.sh" --fsdp --fsdp-amp --tensor-parallel "${TENSOR:-8}" "$@"
