#!/usr/bin/env bash
# Run a command until it is done: again when it was asked to stop and saved its state, or has lost another process of its
# job (exit code 75; 134 where JAX noticed first that process 0 is gone), never otherwise.
#
#     launch/until_done.sh python train.py --config configs/dydit_xl2_07.py --workdir gs://bucket/run
#
# SIGTERM or Ctrl-C to this script goes on to the command, once; then nothing is started again, and its code is returned.
set -euo pipefail -o monitor
stopping=no
trap 'stopping=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
while true; do
  "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  # A signal ends `wait` before the command has ended.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  case "$stopping $code" in
    "no 75" | "no 134") ;;
    *) exit "$code" ;;
  esac
done
