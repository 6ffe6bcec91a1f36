#!/usr/bin/env bash
# Stage 4: router training from the language model's feedback. See --help for how to run it on one CPU, one node or many.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" 4 "$@"
