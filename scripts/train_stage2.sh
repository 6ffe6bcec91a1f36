#!/usr/bin/env bash
# Stage 2: visual instruction tuning (all but the router). See --help for how to run it on one CPU, one node or many.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" 2 "$@"
