#!/usr/bin/env bash
# Loss curves on one large GPU, without a network. Each part takes some minutes on an H200-class GPU; `pair` comes first.
#
#   bash gpu_english.sh TEXT [pair|sweep|seeds|long|moe|bench]     TEXT: a file or folder of text, see data/text/prepare.py
#
# Logs, tables and plots go to results/gpu_english/. PYTHON names the interpreter (default python3; torch 2.11 or newer).
set -euo pipefail
cd "$(dirname "$0")"
text=${1:?usage: bash gpu_english.sh TEXT [pair|sweep|seeds|long|moe|bench]} part=${2:-pair} python=${PYTHON:-python3} results=results/gpu_english
mkdir -p "$results"
exec > >(tee -a "$results/$part.log") 2>&1
echo "command: bash gpu_english.sh $*"
$python -c "import torch; print('torch', torch.__version__, torch.cuda.get_device_name())"

if [ -f data/english/meta.json ]; then echo "data/english is there already; $text is not read"
else $python data/text/prepare.py "$text" --out_dir=data/english; fi

# A part that was cut short goes on where it was when it is started again: what is in $results already is not run anew
# (remove it for that), and a run goes on from its last checkpoint.
train() {  # train NAME CONFIG --key=value ...
    local name=$1 config=$2 start=--overwrite
    shift 2
    if [ -f "$results/$name/metrics.jsonl" ]; then return; fi
    if [ -f "out/gpu/$name/last.pt" ]; then start=--resume; fi
    $python train.py "config/$config.py" --out_dir="out/gpu/$name" $start "$@"
    mkdir -p "$results/$name"
    cp "out/gpu/$name/metrics.jsonl" "out/gpu/$name/config.json" "$results/$name/"
}

draw() {  # draw NAME RUN RUN ... [--labels=...]
    local name=$1 arg args=()
    shift
    for arg in "$@"; do case $arg in --*) args+=("$arg") ;; *) args+=("$results/$arg") ;; esac; done
    $python plot.py "${args[@]}" --out="$results/$name.png" --table="$results/$name.md"
}

bench() {  # bench NAME --key=value ...
    local name=$1
    shift
    if [ -f "$results/$name.json" ]; then return; fi
    if $python bench.py "$@" --json="out/$name.json"; then cp "out/$name.json" "$results/"; fi
}

case $part in
pair)
    train baseline gpu_english --bag_size=1
    train tst gpu_english
    draw pair baseline tst ;;
sweep)  # a third of the steps: the learning rate of each side, then s and r
    for lr in 1e-3 2e-3 3e-3 6e-3; do
        train "sweep_baseline_$lr" gpu_english --bag_size=1 --max_steps=2000 --learning_rate=$lr
        train "sweep_tst_$lr" gpu_english --max_steps=2000 --learning_rate=$lr
    done
    for s in 2 6 8; do train "sweep_s$s" gpu_english --max_steps=2000 --bag_size=$s; done
    for r in 0.2 0.4; do train "sweep_r$r" gpu_english --max_steps=2000 --superposition_ratio=$r; done
    draw sweep $(cd "$results" && ls -d sweep_*/) ;;
seeds)
    for seed in 1 2; do
        train "baseline_seed$seed" gpu_english --bag_size=1 --seed=$seed
        train "tst_seed$seed" gpu_english --seed=$seed
    done
    draw seeds baseline baseline_seed1 baseline_seed2 tst tst_seed1 tst_seed2 --labels=baseline,baseline,baseline,TST,TST,TST ;;
long)  # from these the speed-up at equal loss is read
    train baseline_9000 gpu_english --bag_size=1 --max_steps=9000
    train baseline_12000 gpu_english --bag_size=1 --max_steps=12000
    draw long baseline baseline_9000 baseline_12000 tst ;;
moe)
    train moe_baseline gpu_moe --bag_size=1
    train moe_tst gpu_moe
    draw moe moe_baseline moe_tst ;;
bench)
    mkdir -p out
    bench bench_124m --parts=roofline,loss,step,moe,loader
    for shape in 270m 600m; do  # each bag size is a graph of its own: fewer of them, to stay within ten minutes
        bench bench_$shape --parts=step --shape=$shape --bag_sizes=1,8,16
    done
    if [ -n "${NANOGPT:-}" ]; then  # folder of a clone of karpathy/nanoGPT
        $python data/python_source/prepare.py
        bench bench_nanogpt --parts=nanogpt --shape=124m --nanogpt="$NANOGPT"
    fi ;;
*)
    echo "no such part: $part"; exit 1 ;;
esac
