#!/usr/bin/env bash
# Try launch/slurm.sbatch on a real SLURM of two virtual nodes on this machine, CPU only, as root:
#
#     apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2
#     PYTHON=.venv/bin/python launch/try_slurm.sh
#
# Two jobs of two tasks train the same small model on the digits. One is asked to stop on the way: it must save, be
# requeued, go on, and end with the same bytes as the other. Everything lives in a temporary folder and in namespaces of
# its own: the network is loopback alone, and all processes end with the script, at the latest after LIMIT seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" != inside ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  PYTHON=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}") timeout --kill-after=10 "${LIMIT:-900}" \
    unshare --mount --net --uts --pid --fork --mount-proc --kill-child launch/try_slurm.sh inside "$folder"
  exit
fi

folder=$2
export JAX_PLATFORMS=cpu SLURM_CONF=$folder/slurm.conf

# --- A network of one machine, with the names of two ---
ip link set lo up
ip address add 10.0.0.1/32 dev lo # programs ask the resolver for none but 127.0.0.1 in vain
hostname virtual
echo "127.0.0.1 localhost virtual node0 node1" >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts

# --- SLURM ---
cat >"$SLURM_CONF" <<SETTINGS
ClusterName=virtual
SlurmctldHost=virtual(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired.
AuthInfo=socket=$folder/munge/socket,cred_expire=20
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName=node0 NodeHostname=virtual NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=node1 NodeHostname=virtual NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
SETTINGS
mkdir -m 755 "$folder/munge" "$folder/state" "$folder/spool.node0" "$folder/spool.node1"
head --bytes=1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --log-file="$folder/munge.log" --seed-file="$folder/munge/seed"
slurmctld
slurmd -N node0
slurmd -N node1
until [ "$(sinfo --noheader --format=%t 2>/dev/null | sort -u)" = idle ]; do sleep 1; done
slurmd -V
sinfo

# --- Two jobs ---
submit() {
  sbatch --parsable --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 --output="$folder/$1.log" \
    launch/slurm.sbatch --config digits_dit --workdir "$folder/$1" --config.train.steps=100 --config.model.depth=1 \
    --config.data.batch_size=8 --config.tracking.every_steps=1 --config.checkpoint.every_steps=1000
}
fail() {
  echo "$1"
  tail -n 40 "$folder"/*.log
  exit 1
}
reports() { if [ -e "$1" ]; then wc --lines <"$1"; else echo 0; fi; }
job=$(submit stopped)
submit straight >/dev/null
until [ "$(reports "$folder/stopped/metrics.jsonl")" -ge 20 ]; do sleep 1; done
scancel --signal=TERM "$job"
until [ -z "$(squeue --noheader)" ]; do sleep 1; done

grep -E 'Stopped: step|Continuing from step' "$folder/stopped.log" || fail "The job was not stopped and continued."
found=$(scontrol show job "$job" | grep -oE 'JobState=\w+|Restarts=[0-9]+' | xargs)
[ "$found" = "JobState=COMPLETED Restarts=1" ] || fail "The job was not requeued once: $found."
cmp "$folder/stopped/weights.safetensors" "$folder/straight/weights.safetensors" || fail "The two jobs differ."
echo "The job that was stopped and requeued has the same weights, byte for byte, as the one that ran through."
