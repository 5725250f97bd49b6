#!/usr/bin/env bash
# What the container of deploy/Dockerfile runs: a script of the project with its flags, or any other command.
set -euo pipefail

case "${1:-}" in
    *.py) set -- python "$@" ;;
esac
exec "$@"  # in place of this shell, which would keep signals to itself
