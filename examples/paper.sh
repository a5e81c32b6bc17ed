#!/usr/bin/env bash
# The paper's experiments and some that it leaves open, one command each, at any scale.
#
#     bash examples/paper.sh                     all, at the scale of results/paper: hours on two CPU cores
#     bash examples/paper.sh bag_size ratio      some
#     CONFIG=config/dense_270m.py JOBS=8 bash examples/paper.sh bag_size      eight at a time, one per GPU
#
# Experiments share their runs and resume where they were interrupted. OUT gets NAME.md, .csv and .png.
set -euo pipefail
trap 'exit 130' INT TERM
config=${CONFIG:-config/small.py} seeds=${SEEDS:-1,2,3} out=${OUT:-out/paper} python=${PYTHON:-python}
dataset=${DATASET:-$(sed -n 's/^dataset = "\(.*\)".*/\1/p' "$config")}
dataset=${dataset:-python_source}
machine="--jobs=${JOBS:-1} --threads=${THREADS:-0}" failed=

keep() { # NAME FOLDER: name what a tool wrote there after the experiment
    for written in table.md runs.csv sweep.png compare.png; do
        [ ! -e "$2/$written" ] || mv "$2/$written" "$out/$1.${written#*.}"
    done
}

sweep() { # NAME KNOBS. Runs are named by the grid: set $runs, their folder, if other knobs differ
    name=$1 folder=$out/${runs:-runs}; shift
    echo "---- $name"
    "$python" -m tools.sweep "$config" --dataset="$dataset" --seed="$seeds" --out_dir="$folder" $machine "$@" ||
        failed="$failed $name"
    keep "$name" "$folder"
}

# ------------------------------------------------------------------------------------------- the paper's own

rates() { sweep rates --bag_size=1,2,4 --learning_rate=4e-3,8e-3,1.6e-2; }
bag_size() { sweep bag_size --bag_size=1,2,3,4,6,8; }
ratio() { sweep ratio --bag_size=1,2 --superposition_ratio=0.1,0.2,0.3,0.4,0.5,0.6; }
grid() { sweep grid --bag_size=1,2,4 --superposition_ratio=0.1,0.2,0.3,0.4; }
sides() { sweep sides --bag_size=1,2,4 --superposition=full,input,output; }
losses() { sweep losses --bag_size=1,2 --loss=mce,mce_alt,bce,hinge; }
reinit() { sweep reinit --bag_size=1,2 --reinit_at_switch=';embedding;head;embedding,head;optimizer'; }
weights() {
    "$python" -m tools.fit_mi --dataset="$dataset" --out="$out/fitted.json"
    sweep weights --bag_size=1,2,8 --bag_weights=uniform,power,exponential,first
    runs=fitted sweep weights_fitted --bag_size=2,8 --bag_weights=fitted --fitted="$out/fitted.json"
}
compare() { # equal FLOPs, equal loss, equal data
    "$python" -m tools.compare "$config" --dataset="$dataset" --seeds="$seeds" --lengths=1,1.5,2 \
        --out_dir="$out/runs" $machine || failed="$failed compare"
    keep compare "$out/runs"
}

# ----------------------------------------------------------------------------------- what the paper leaves open

step_down() { sweep step_down --bag_size=1,2,4,8,4-2,8-4-2; }
documents() { sweep documents --bag_size=1,2,4 --document_bags=False,True; }
muon() { sweep muon --bag_size=1,2 --optimizer=adamw,muon; }
muon_rates() { sweep muon_rates --bag_size=1,2 --optimizer=muon --matrix_learning_rate=4e-3,0,1.6e-2; } # 0: 8e-3
window() { sweep window --bag_size=1,2 --attention_window=0,32; }
schedule() { sweep schedule --bag_size=1,2 --schedule=wsd,cosine; }
experts() { runs=experts sweep experts --bag_size=1,2 --n_expert=8 --top_k=2 --ff_dim=96; }
texts() { # prepare them first: data/english, and data/english_1024 with a vocabulary of 1,024
    for text in ${TEXTS:-english english_1024}; do dataset=$text runs=$text sweep "$text" --bag_size=1,2; done
}
vocabularies() { # the first 1,024 and 4,096 of GPT-2's tokens, for the text of a corpus of bytes
    [ -e "$out/4096.tiktoken" ] || "$python" - "$dataset" "$out" <<'END'
import base64, pathlib, sys, tiktoken
from nanotst.formats import find
corpus, out = pathlib.Path(find(sys.argv[1])[0]), pathlib.Path(sys.argv[2])
for split in "train", "val":
    text = (corpus / f"{split}.bin").read_bytes().replace(b"\0", b"\n<|endoftext|>\n")
    (out / f"{split}.txt").write_bytes(text)
ranks = [base64.b64encode(token) for token in tiktoken.get_encoding("gpt2")._mergeable_ranks]
for n in 1024, 4096:
    (out / f"{n}.tiktoken").write_bytes(b"".join(b"%s %d\n" % (ranks[i], i) for i in range(n)))
END
    for n in 1024 4096; do
        text=$out/vocabulary_$n
        "$python" data/text/prepare.py "$out/train.txt" --val="$out/val.txt" --encoding="$out/$n.tiktoken" --out_dir="$text"
        dataset=$text runs=vocabulary_${n}_runs sweep "vocabulary_$n" --bag_size=1,2,3,4,6
    done
}
repeat() { # corpora so small that TST with s 2 and r 0.3 reads them 2, 4, 8 and 16 times
    for times in ${TIMES:-2 4 8 16}; do
        small=$out/repeat_$times
        "$python" -m examples.small_corpus "$dataset" "$small" --tokens=$((10649600 / times))
        dataset=$small runs=repeat_${times}_runs sweep "repeat_$times" --bag_size=1,2
    done
}
large="--n_layer=3 --n_embd=96" # 0.4M
size_400k() { # as many bytes per parameter
    runs=size_400k sweep size_400k --bag_size="${SIZES:-1,2,4,6}" $large --max_steps=2750 \
        --learning_rate="${RATES:-3e-3}"
}

# ----------------------------------------------------------------------------------------- what is disputed

budget() { # does the gain shrink with the budget? Rates at both ends
    for steps in ${STEPS:-500 1000 2000 4000 8000}; do
        runs=budget_$steps sweep "budget_$steps" --bag_size=1,2 --max_steps="$steps" \
            --learning_rate="${RATES:-4e-3,8e-3,1.6e-2}"
    done
}
decay() { # after compare and budget: speed-up over baselines that finished, and over one before its decay
    set -- "$out"/runs/s*_max_steps=*_seed* "$out"/budget_8000/s1*
    labels=$(printf '%s\n' "$@" | sed 's/.*\///; s/_seed.*//' | paste -sd, -)
    "$python" -m tools.plot "$@" --labels="$labels" --panels=flops --out="$out/decay.png" | tee "$out/decay.md"
}
context() { runs=context sweep context --bag_size=1 --block_size=128,256; } # is it only longer context?
muon_sides() { # which half of a bag helps, with Muon and each side's own matrix rate?
    runs=muon_sides sweep muon_sides --bag_size=1,2,4 --superposition=full,output,input $large --max_steps=1375 \
        --optimizer=muon --learning_rate=3e-3 --matrix_learning_rate="${RATES:-2e-3,4e-3,8e-3,1.6e-2}"
}
fade() { runs=fade sweep fade --bag_size=1,2 --superposition=full,output --fade=0,0.33; }
spread() { # what makes seeds differ: the order of the text, or the initial weights? What narrows it?
    local seeds=1,2,3,4,5,6,7,8,9,10
    for seed in {1..10}; do
        [ -e "$out/weights$seed/last.pt" ] || "$python" train.py "$config" --dataset="$dataset" --seed=$seed \
            --bag_size=1 --max_steps=1 --learning_rate=1e-20 --compile=off --out_dir="$out/weights$seed"
    done
    short="--bag_size=${SIZES:-2} --max_steps=500" drawn=$(printf ",$out/weights%s/last.pt" {1..10})
    runs=spread sweep spread_order $short --init_from="$out/weights1/last.pt"
    seeds=1 runs=spread sweep spread_weights $short --init_from="${drawn#,}"
    for knob in warmup_steps=150,300 grad_clip=0.3 qk_norm=True; do
        runs=spread_${knob%=*} sweep "spread_${knob%=*}" --bag_size=1,2 --max_steps=500 --$knob
    done
}

# ----------------------------------------------------------------------------------- the models of bag_size

checkpoints() { # of bag size $1
    awk -F, -v s="$1" -v runs="$out/runs" '$2 == s {print runs "/" $1 "/last.pt"}' "$out/bag_size.csv"
}
positions() { # loss by tokens of context, and on other text
    labels=$({ checkpoints 1 | sed 's/.*/baseline/'; checkpoints 2 | sed 's/.*/TST/'; } | paste -sd, -)
    evaluate="$python -m tools.evaluate $(checkpoints 1) $(checkpoints 2) --labels=$labels"
    $evaluate --dataset="$dataset" --by_position | tee "$out/positions.md"
    $evaluate --dataset="${OTHER:-english}" --eval_positions=262144 | tee "$out/other_text.md"
}
tasks() { # lm-eval; see examples/lm_eval_local
    "$python" -m examples.lm_eval_local.make_tasks --dataset="$dataset" --out_dir="$out/tasks"
    for checkpoint in $(checkpoints 1) $(checkpoints 2); do
        "$python" -m tools.export "$checkpoint" "$out/hf" --overwrite
        HF_HUB_OFFLINE=1 "$python" -m lm_eval --model hf --model_args pretrained="$out/hf",dtype=float32 \
            --device cpu --include_path "$out/tasks" --tasks last_word,swapped_words --batch_size 32
    done
}

all=$(sed -n 's/^\([a-z_0-9]*\)() {.*/\1/p' "$0" | grep -vxE 'keep|sweep|checkpoints' | paste -sd' ' -)
mkdir -p "$out"
for experiment in ${@:-$all}; do
    [[ " $all " = *" $experiment "* ]] || { echo "error: no experiment $experiment; there are $all" >&2; exit 1; }
    $experiment
done
[ -z "$failed" ] || { echo "error: some runs failed; start these again:$failed" >&2; exit 1; }
