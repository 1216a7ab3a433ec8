#!/usr/bin/env bash
# The strategy that ColossalAI calls Gemini; same as offload.sh.
exec bash "$(dirname "$0")/offload.sh" "$@"
