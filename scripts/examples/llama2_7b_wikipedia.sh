#!/usr/bin/env bash
# Continue the training of LLaMA-2 7B on 90.91 % Wikipedia and 9.09 % web text (Branch-Train-MiX, arXiv:2403.07816).
#
#     WIKI='raw/wiki-*.json.gz' CC_EN='raw/cc_en_*.json.gz' bash scripts/examples/llama2_7b_wikipedia.sh FLAGS…
#     bash scripts/examples/llama2_7b_wikipedia.sh --tiny FLAGS…
#
# FLAGS are added to those of open_lm.main. --tiny runs the same commands on a small random llama, on 8 CPU processes
# and on documentation from the Python installation. Repeat the command after an interruption: it skips finished stages
# and continues the others. Set the environment variables below to change a setting.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

tiny=
if [[ ${1:-} == --tiny ]]; then
    tiny=yes
    shift
    export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    : "${DIR:=llama2_tiny_wikipedia}" "${WEIGHTS:=$DIR/llama}" "${ARCHITECTURE:=$DIR/llama/model.json}"
    : "${WIKI:=$DIR/text/train-0[0-2].jsonl.zst}" "${CC_EN:=$DIR/text/train-03.jsonl.zst}"
    : "${NPROC:=8}" "${SEQLEN:=64}" "${GLOBAL_BATCH:=8}" "${STEPS:=4}" "${WARMUP:=1}"
    : "${SAVE_EVERY:=2}" "${MILESTONE_EVERY:=4}" "${LOG_EVERY:=1}" "${DATA_WORKERS:=1}" "${WORKERS:=0}"
fi
: "${DIR:=llama2_7b_wikipedia}"              # all results; on several machines a folder that all of them share
: "${WEIGHTS:=meta-llama/Llama-2-7b-hf}"     # name on the hub (HF_TOKEN: a token with permission), folder or URL
: "${ARCHITECTURE:=$here/llama2_7b_2048.json}"   # model configuration that the weights must have
: "${WIKI:?set it to the files of Wikipedia, such as WIKI=raw/wiki-*.json.gz (or use --tiny)}"
: "${CC_EN:?set it to the files of web text, such as CC_EN=raw/cc_en_*.json.gz (or use --tiny)}"
: "${NPROC:=gpu}"                            # processes per machine; gpu: one per GPU
: "${HOSTS:=}"                               # hosts file of scripts/launch.py; empty: this machine
: "${MESH:=-1,2,4}"                          # data replicas, FSDP shards, tensor parts
: "${SEQLEN:=2048}"                          # tokens of a sequence: that of ARCHITECTURE
: "${GLOBAL_BATCH:=128}"                     # sequences of a step: 4 micro-batches of 32, over all processes
: "${ACCUM:=4}" "${PRECISION:=bf16}"         # micro-batches of a step; type of parameters and computation
: "${STEPS:=200000}" "${WARMUP:=5000}" "${LR:=1e-4}" "${END_LR:=1e-5}"
: "${SAVE_EVERY:=25000}" "${MILESTONE_EVERY:=50000}" "${LOG_EVERY:=100}"
: "${DATA_WORKERS:=$(getconf _NPROCESSORS_ONLN)}" "${WORKERS:=2}"   # processes that tokenize, and that read for a rank

stage() { # stage TITLE RESULT COMMAND…: run a command unless its result exists
    if [[ -e $2 ]]; then
        echo "$1: already done ($2)"
        return
    fi
    echo "$1"
    "${@:3}"
}

model=$DIR/model data=$DIR/data/$SEQLEN-v1 name=run
final=$DIR/logs/$name/checkpoints/epoch_1.pt
if [[ -n $tiny ]]; then
    stage 'Gather text' "$DIR/text/train-03.jsonl.zst" \
        "$python" "$here/../python_docs.py" --output-dir "$DIR/text" --max-mb 0.1
    stage 'Create a model' "$DIR/llama" "$python" "$here/tiny_llama.py" "$DIR/llama" --seq-len "$SEQLEN"
fi

stage 'Import the weights' "$model" \
    "$python" -m open_lm.hf.convert import "$WEIGHTS" "$model" --model "$ARCHITECTURE"

# The command itself continues unfinished data, and refuses to mix them with data of other settings.
echo 'Tokenize and shuffle the text'
"$python" "$here/../../datapreprocess/make_2048.py" --mixture wikipedia_mixture --source wiki="$WIKI" \
    --source cc_en="$CC_EN" --output-per-source --tokenizer "$model/tokenizer" --add-bos --seqlen "$SEQLEN" \
    --num-workers "$DATA_WORKERS" --output-dir "$DIR/data"

train() { # in the background, so that signals to this script reach the ranks, which save and stop
    local launch=("$python" "$here/../launch.py" --nproc-per-node "$NPROC") code=0
    if [[ -n $HOSTS ]]; then
        launch+=(--hosts "$HOSTS")
    fi
    "${launch[@]}" -m open_lm.main --model "$model/model.json" --pretrained "$model/step_00000000" --resume latest \
        --dataset-manifest "$data/wiki/manifest.jsonl" "$data/cc_en/manifest.jsonl" \
        --train-data-mix-weights 90.91 9.09 --multiple-data-passes --data-key npy --workers "$WORKERS" \
        --train-num-samples "$((STEPS * GLOBAL_BATCH * SEQLEN))" --epochs 1 \
        --global-batch-size "$GLOBAL_BATCH" --accum-freq "$ACCUM" \
        --mesh-dim "$MESH" --precision "$PRECISION" --activation-checkpointing full \
        --optimizer adamw --lr "$LR" --lr-scheduler cosine --lr-cooldown-end "$END_LR" --warmup "$WARMUP" \
        --beta1 0.9 --beta2 0.95 --eps 1e-6 --wd 0.1 --grad-clip-norm 1 \
        --save-every-n-steps "$SAVE_EVERY" --save-milestone-every "$MILESTONE_EVERY" \
        --log-every-n-steps "$LOG_EVERY" --logs "$DIR/logs" --name "$name" "$@" &
    local launcher=$!
    trap : INT # Ctrl-C reaches the launcher too
    trap 'kill -TERM "$launcher"' TERM
    trap 'kill -USR1 "$launcher"' USR1
    wait "$launcher" || code=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal interrupted the wait
        code=0
        wait "$launcher" || code=$?
    done
    trap - INT TERM USR1
    if [[ $code == 0 && ! -e $final ]]; then
        echo 'The training was stopped and has saved: repeat the command to continue it' >&2
        code=1
    fi
    return "$code"
}

stage 'Train' "$final" train "$@"
stage 'Export the model' "$DIR/exported" \
    "$python" -m open_lm.hf.convert export "$DIR/logs/$name" "$DIR/exported" --verify
