#!/usr/bin/env bash
# ZeRO-3: parameters, gradients and optimizer state are sharded over all ranks.
exec bash "$(dirname "$0")/run.sh" --fsdp --fsdp-amp "$@"
