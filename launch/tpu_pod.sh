#!/usr/bin/env bash
# Train on a Cloud TPU slice, all hosts of it: make it, install, run. Needs the gcloud CLI, logged in.
#
#     NAME=dydit ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite REPOSITORY=https://... \
#         launch/tpu_pod.sh --config configs/dydit_xl2_07.py --workdir gs://bucket/run
#
# The same command again, on the same slice or on a new one, goes on from the last checkpoint.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${REPOSITORY:?}"
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }

gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" >/dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$VERSION"
everywhere "test -d dydit-jax || git clone --quiet $REPOSITORY dydit-jax
  cd dydit-jax && python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[tpu]'"
everywhere "cd dydit-jax && launch/until_done.sh .venv/bin/python train.py --distributed $(printf '%q ' "$@")"
