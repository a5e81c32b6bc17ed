#!/usr/bin/env bash
# Tests, benchmarks and experiments for one large GPU, in parts of less than four minutes on an H100.
#
#     bash examples/gpu.sh                       all parts, the most valuable first
#     bash examples/gpu.sh checks curves         some of them
#     NANOGPT=../nanoGPT bash examples/gpu.sh speed      beside a clone of karpathy/nanoGPT
#     bash examples/gpu.sh --dry-run             every part on the CPU, in tiny settings
#
#     checks   tests of everything that runs differently on CUDA
#     speed    tokens per second against nanoGPT; time, MFU and busy share of a step, also with CUDA graphs
#     curves   baseline and TST (s 4), three seeds each
#     sizes    bags of 1, 2, 4, 8 and 16
#     rates    three learning rates for each side, in 2,000 steps
#     long     baselines of 1.4 times the steps: the speed-up at equal loss
#     11m      11 million parameters, 18 bytes per parameter
#     moe      a mixture of experts, as wide as the dense model for each position
#
# Nothing is installed or downloaded: PYTHON (default: python) needs torch and numpy, and pytest for checks.
# Prepare DATASET (default: python_source) first. Runs go to OUT (default: out/gpu). JOBS runs (default: 6)
# train at the same time, since a small model leaves the GPU idle; more than 6 compile too slowly on 16 cores.
# Start the same command again after an interruption: finished runs are skipped, others resumed.
set -eu
trap 'exit 130' INT TERM
python=${PYTHON:-python} out=${OUT:-out/gpu} dataset=${DATASET:-python_source} jobs=${JOBS:-6}
dry= tiny= bench=
if [ "${1:-}" = --dry-run ]; then
    shift
    dry=1 out=${OUT:-out/gpu_dry_run} jobs=${JOBS:-1}
    tiny="--n_layer=1 --n_head=2 --n_embd=16 --ff_dim=16 --block_size=16 --total_batch=256 --max_steps=10
        --warmup_steps=2 --eval_interval=5 --eval_positions=256 --device=cpu --compile=off --seed=1337"
    bench="--device=cpu --compile=off --shape=curves --rows=2 --bag_sizes=1,2 --repeats=1"
fi
failed=

sweep() { # NAME KNOBS: runs that several parts want are trained once; a table for each part
    name=$1 folder=$out/${runs:-runs}; shift
    "$python" -m tools.sweep config/gpu.py --dataset="$dataset" --out_dir="$folder" --jobs="$jobs" \
        --plot=no "$@" $tiny || failed="$failed $name"
    [ ! -e "$folder/table.md" ] || mv "$folder/table.md" "$out/$name.md"
    [ ! -e "$folder/runs.csv" ] || mv "$folder/runs.csv" "$out/$name.csv"
}
measure() { # NAME KNOBS: figures that are there are kept
    name=$1; shift
    [ -e "$out/$name.json" ] || "$python" -m tools.bench "$@" $bench --json="$out/$name.json" ||
        failed="$failed $name"
}

checks() { NANOTST_CUDA_DRY_RUN=$dry "$python" -m pytest -q tests/cuda || failed="$failed checks"; }
speed() {
    [ -z "${NANOGPT:-}" ] ||
        measure nanogpt --parts=nanogpt --nanogpt="$NANOGPT" --shape=gpt2_124m --rows=16 --repeats=1
    measure step_124m --parts=step --shape=gpt2_124m --rows=16 --bag_sizes=1,8
    measure step_gpu --parts=step --shape=gpu --bag_sizes=1,4
    measure step_gpu_graphs --parts=step --shape=gpu --bag_sizes=1,4 --compile=graphs
}
curves() { sweep curves --bag_size=1,4 --seed=1337,1,2; }
sizes() { sweep sizes --bag_size=1,2,4,8,16; }
rates() { sweep rates --bag_size=1,4 --max_steps=2000 --warmup_steps=150 --learning_rate=1e-3,2e-3,4e-3; }
long() { sweep long --bag_size=1 --max_steps=4200 --seed=1337,1,2; }
11m() {
    runs=11m sweep 11m --bag_size=1,4 --n_layer=6 --n_head=6 --n_embd=384 --ff_dim=1024 \
        --learning_rate=1e-3 --max_steps=6000
}
moe() {
    runs=moe sweep moe --bag_size=1,4 --n_expert=32 --top_k=4 --ff_dim=176 --qk_norm=True --max_steps=1500
}

all="checks speed curves sizes rates long 11m moe"
mkdir -p "$out"
for part in ${@:-$all}; do
    case " $all " in
    *" $part "*) echo "---- $part"; "$part" ;;
    *) echo "error: no part $part; there are $all" >&2; exit 1 ;;
    esac
done
[ -z "$failed" ] || { echo "error: these failed:$failed; start again to resume" >&2; exit 1; }
