#!/bin/bash
# Train on several nodes under SLURM, with one torchrun per node, which starts a rank for each of its GPUs:
#
#     sbatch --nodes=8 examples/slurm.sh config/moe_10b_a1b.py --out_dir=out/10b_tst
#
# Run it from the repository's root. The repository, the corpus and out_dir must be on a file system that all nodes
# share. If a rank dies, torchrun restarts all of them, and they resume from the last checkpoint. Before the time limit
# SLURM sends SIGTERM, and the run saves and stops; submit the same command again to resume it. After the loss of a
# node, SLURM requeues the job by itself. Without SLURM, run the same torchrun command on each node by hand, with a
# new --rdzv_id for each launch, by which a restarted run knows its own folder.
#
# If host names are not addresses on the network: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
# Not run under SLURM yet; two torchruns with two CPU ranks each, on one machine, have been.
#SBATCH --job-name=nanotst
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PYTHON=${PYTHON:-.venv/bin/python}
# Restart counts may differ between nodes, and torchrun's shared store keeps addresses of dead ranks: use a new store
export OMP_NUM_THREADS=8 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

out_dir=$(printf '%s\n' "$@" | sed -n 's/^--out_dir=//p') begin= # a folder in a config file is not seen here
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && begin=--overwrite # lost before its first checkpoint
[ -e "${out_dir:-out/run}/last.pt" ] && begin=--resume

longer=$("$PYTHON" -m torch.distributed.run --help | grep -o -m 1 -e --shutdown-timeout) # torch 2.13, not 2.11
srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --max_restarts=3 \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --rdzv_backend=c10d --rdzv_endpoint="$HOST:29500" \
    --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" ${longer:+$longer=540} train.py "$@" $begin
