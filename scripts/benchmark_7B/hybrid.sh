#!/usr/bin/env bash
# Hybrid: sharded within a host and replicated across hosts.
exec bash "$(dirname "$0")/run.sh" --fsdp --fsdp-amp --fsdp-hybrid "$@"
