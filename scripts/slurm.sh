#!/usr/bin/env bash
# A run over several machines under Slurm: one torchrun on each, which find each other and start a process for each GPU.
#
#     sbatch --nodes 4 --gpus-per-node 8 scripts/slurm.sh RECIPE.toml [key.path=value ...]
#
# Submit it in a folder that all machines see, with `out` on storage that they share. When the time is up, Slurm sends
# SIGTERM ahead (--signal); the run saves and ends, and the same command goes on from there.
#SBATCH --job-name minitune
#SBATCH --ntasks-per-node 1
#SBATCH --cpus-per-task 16
#SBATCH --signal TERM@300
#SBATCH --output %x-%j.log
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus | wc -l)}

exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 --shutdown-timeout 240 \
    scripts/train.py "$@"
