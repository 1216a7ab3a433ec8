#!/usr/bin/env bash
# ZeRO-3 with parameters and optimizer state in host memory.
exec bash "$(dirname "$0")/run.sh" --fsdp --fsdp-amp --fsdp-cpu-offload "$@"
