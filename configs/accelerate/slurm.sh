#!/usr/bin/env bash
# A training run of any length, in pieces, as SLURM gives and takes back its nodes:
#   sbatch --nodes 2 configs/accelerate/slurm.sh --config configs/nwm_cdit_xl.yaml
# Sharded (FSDP2): sbatch --export=ALL,ACCELERATE_USE_FSDP=true …. Fill in what your cluster asks for: partition, account,
# modules, the virtual environment. SLURM itself requeues the job when a node fails or is wanted by others (--requeue).
#SBATCH --job-name=cdit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

STOPPED=75      # train.py's exit code for: stopped, a checkpoint is written, --resume auto goes on from it
MAX_RESTARTS=20 # of a job whose processes were killed, by lack of memory perhaps, which may never go well

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another for each job, in case two share a node
export MASTER_ADDR MASTER_PORT

# One task per GPU, each a train.py of its own: no launcher stands between, so that its exit code comes back. SLURM's
# SIGTERM, 120 seconds before the end and at preemption, goes to all processes of a task; the shells only wait.
# When a process fails, the others are stopped for want of it. srun gives the highest code of all, so that failures are
# raised above all others here, and lowered again below.
trap : TERM
# When one task ends, the others have --wait seconds to write their checkpoint; tasks left behind by a lost one end, too.
# shellcheck disable=SC2016 # the variables are those of each task
srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    trap : TERM INT USR1
    python train.py "$@" --resume auto
    code=$?
    exit $((code == 0 || code == '"$STOPPED"' || code >= 128 ? code : code + 200))
' train "$@"
code=$?
((code > 200)) && code=$((code - 200)) # else of 128 and more: killed by a signal

if ((code == STOPPED || (code >= 128 && ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS))); then
    echo "exit code $code: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
