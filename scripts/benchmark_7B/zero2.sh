#!/usr/bin/env bash
# ZeRO-2: like fsdp.sh, but parameters stay gathered from the forward to the backward pass.
exec bash "$(dirname "$0")/run.sh" --fsdp --fsdp-amp --fsdp-zero2 "$@"
