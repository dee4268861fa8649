#!/usr/bin/env bash
# A training run of any length that survives time limits, preemption and node failures under SLURM:
#   sbatch --nodes 2 configs/accelerate/slurm.sh --config configs/nwm_cdit_xl.yaml
# Sharded (FSDP2): sbatch --export=ALL,ACCELERATE_USE_FSDP=true …. Add what your cluster requires: partition, account,
# modules, the virtual environment. SLURM itself requeues the job on node failure and preemption (--requeue).
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

STOPPED=75      # exit code of train.py: stopped with a checkpoint, which --resume auto continues
MAX_RESTARTS=20 # of a job whose processes were killed, for example out of memory, which may never succeed

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # differs per job, in case two share a node
export MASTER_ADDR MASTER_PORT

# One train.py per GPU without a launcher, so that its exit code is visible. SLURM sends SIGTERM, 120 seconds before the
# time limit and at preemption, to all processes of a task; the shells only wait. When a process fails, the others stop as
# well. srun returns the highest exit code, so failures are raised above all others here, and lowered again below.
trap : TERM
# When one task ends, the others have --wait seconds to write their checkpoint, and then end as well.
# shellcheck disable=SC2016 # variables are expanded in each task
srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    trap : TERM INT USR1
    python train.py "$@" --resume auto
    code=$?
    exit $((code == 0 || code == '"$STOPPED"' || code >= 128 ? code : code + 200))
' train "$@"
code=$?
((code > 200)) && code=$((code - 200)) # 128 and more: killed by a signal

if ((code == STOPPED || (code >= 128 && ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS))); then
    echo "exit code $code: job $SLURM_JOB_ID is requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
