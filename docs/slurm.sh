#!/bin/bash
# One stage of spo on several nodes: one task a GPU, and no launcher between srun and spo.
#   sbatch docs/slurm.sh align spo
# Submit it in the experiment's folder, on a file system that all nodes share.
#SBATCH --job-name=spo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
# --signal: SIGTERM ten minutes before the end; a training finishes its iteration and saves.
set -u

. .venv/bin/activate
export HF_HUB_OFFLINE=1                                    # compute nodes often have no network
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))              # two jobs on one node: two ports
export MASTER_ADDR MASTER_PORT
export SPO_EXIT_FILE="$PWD/.spo/exit-$SLURM_JOB_ID"        # spo's own code; a task that is killed ends with 137
mkdir -p .spo
rm -f "$SPO_EXIT_FILE"

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec spo "$@"' spo "$@"
code=$?
[ "$code" -eq 0 ] && exit 0
[ -s "$SPO_EXIT_FILE" ] && code="$(cat "$SPO_EXIT_FILE")"

# 75: a node, a server or the network was lost; 130: stopped by the signal, and saved; 143: stopped by it outside of
# a training. All resume when the job starts again. 2 is a mistake in parameters or data: another attempt would fail too.
if { [ "$code" -eq 75 ] || [ "$code" -eq 130 ] || [ "$code" -eq 143 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
