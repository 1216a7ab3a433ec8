#!/usr/bin/env bash
# Sharded inside a host and replicated across hosts.
exec bash "$(dirname "$0")/run.sh" --fsdp --fsdp-amp --fsdp-hybrid "$@"
