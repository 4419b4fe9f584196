#!/usr/bin/env bash
# Train on a Cloud TPU slice, all hosts of it: queue for it, install, start. Needs the gcloud CLI, logged in.
#
#     NAME=dydit ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite REPOSITORY=https://... FLAGS=--spot \
#         launch/tpu_pod.sh --config configs/dydit_xl2_07.py --workdir gs://bucket/run
#
# VERSION is v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for v5e, tpu-ubuntu2204-base for v4.
# FLAGS go to `gcloud compute tpus queued-resources create`: --spot, --reserved, --valid-until-duration=6h.
#
# PREPARE is a command that each host runs first, in its home directory: what brings the data, for example.
#
# The training is a service of each host: it goes on when this script or its connection ends, and it saves when it is
# stopped or its host shuts down. The same command again asks for another slice where this one was taken away, and goes
# on from the last checkpoint.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${REPOSITORY:?}"
read -ra flags <<<"${FLAGS:-}"

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
state() { queue describe --format="value(state.state)" 2>/dev/null || true; }
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

found=$(state)
if [ "$found" = SUSPENDED ] || [ "$found" = FAILED ]; then
  queue delete --force --quiet
  found=""
fi
if [ -z "$found" ]; then
  queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" "${flags[@]}"
fi
until [ "$found" = ACTIVE ]; do
  sleep 20
  found=$(state)
  echo "The slice is $found."
  if [ "$found" = SUSPENDED ] || [ "$found" = FAILED ]; then
    exit 1
  fi
done

everywhere "test -d dydit-jax || git clone --quiet $REPOSITORY dydit-jax; dydit-jax/launch/install.sh tpu"
if [ -n "${PREPARE:-}" ]; then
  everywhere "$PREPARE"
fi
# KillMode=mixed: the stop signal goes to until_done.sh alone, which passes it on once; a second one would mean at once.
everywhere "systemctl is-active --quiet dydit || sudo systemd-run --unit=dydit --collect --uid=\$(id -u) \
  --working-directory=\$HOME/dydit-jax --property=KillMode=mixed --property=TimeoutStopSec=600 \
  \$HOME/dydit-jax/launch/until_done.sh .venv/bin/python train.py --distributed $(printf '%q ' "$@")"

cat <<HINTS
It runs. To follow it, to stop it (it saves first), and to give the slice back:
  gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=0 --command="sudo journalctl --unit=dydit --follow"
  gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all --command="sudo systemctl stop dydit"
  gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force
HINTS
