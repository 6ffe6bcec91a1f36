#!/usr/bin/env bash
# Stage 3: multi-granularity instruction tuning (all but the router). See --help for how to run it on one CPU, one node or many.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" 3 "$@"
