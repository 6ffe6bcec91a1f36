#!/usr/bin/env bash
# Stage 1: connector alignment (the projector). See --help for how to run it on one CPU, one node or many.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" 1 "$@"
