#!/usr/bin/env bash
# What ColossalAI calls gemini: the same as offload.sh.
exec bash "$(dirname "$0")/offload.sh" "$@"
