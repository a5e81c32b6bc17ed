#!/bin/bash
# Train on several nodes under SLURM: one torchrun a node, which starts a rank for each of its GPUs.
#
#     sbatch --nodes=8 examples/slurm.sh config/moe_10b_a1b.py --out_dir=out/10b_tst
#
# Run from the repository's root, which must lie, with the corpus and out_dir, on a file system that all nodes
# share: rank 0 alone writes the log and unsharded checkpoints, and each rank its part of a sharded one.
#
# Without SLURM, the same on each node by hand, HOST being one of them:
#
#     torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --rdzv_id=NAME \
#         --max_restarts=3 train.py ...
#
# (There, when one torchrun has used up its restarts, ranks of other nodes may wait for it for 20 minutes.)
#
# A rank that dies takes the others with it, and torchrun starts all of them again, up to max_restarts times; they
# go on from the last checkpoint by themselves. --rdzv_id must be new for each launch: by it a restarted run knows
# its own folder. Before the time limit SLURM sends SIGTERM, and the run saves and ends; submitted again in the same
# words, it goes on. After the loss of a node SLURM does that itself (--requeue). From the signal on there is the time
# of --shutdown-timeout (30 s in a PyTorch that does not know it) for a step, a short evaluation and a checkpoint.
#
# Where the host name of a node is not its address on the network, gloo and NCCL need to be told which one to use:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
#
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

set -u
GPUS=${SLURM_GPUS_ON_NODE:-8}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=8

out_dir=out/run # as train.py's own default; one from a config file is not seen here
for argument in "$@"; do
    case $argument in --out_dir=*) out_dir=${argument#*=} ;; esac
done
begin=
if [ -e "$out_dir/last.pt" ] || [ -e "$out_dir/last.dcp/manifest.json" ]; then
    begin=--resume
elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    begin=--overwrite # it was lost before its first checkpoint
fi
longer=$("$PYTHON" -m torch.distributed.run --help | grep -o -m 1 -e --shutdown-timeout)

# with --kill-on-bad-exit a node that is lost ends the job instead of leaving the others waiting
srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$GPUS" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$HOST:29500" --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    ${longer:+$longer=540} train.py "$@" $begin
