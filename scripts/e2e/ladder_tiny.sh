#!/usr/bin/env bash
# A scaling law of tiny models, offline: train a ladder of five sizes from 0.1M to 3M parameters, predict the loss of
# a model of 8M parameters, then train that model and compare. It prints a time estimate before it trains.
#
#   scripts/e2e/ladder_tiny.sh FOLDER [--data FILE ...]
#
# --data names files or folders of text; the default is text of the Python installation. Start it again to continue
# after an interruption; other settings or text need another folder. FOLDER/result.json has the prediction, the
# measurement, their difference and the times of both; FOLDER/report.html shows them. The settings can be changed in the
# environment: SIZES, RUN_TOKENS, TARGET, BATCH, LR, LR_EXPONENT, SEQ_LEN, PRECISION, TEXT_MB, VALID_KB, RESAMPLES.
set -euo pipefail
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    echo "usage: $0 FOLDER [--data FILE ...]" >&2
    exit 2
fi
folder=$1
shift
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
read -ra sizes <<< "${SIZES:-1.3e5 3.8e5 8.5e5 1.6e6 2.8e6}"
read -ra run_tokens <<< "${RUN_TOKENS:-250e3 500e3 1000e3}"
seq_len=${SEQ_LEN:-128}
shards=$seq_len-v1/0
ladder=$folder/ladder

# Print and run an open-lm command, unless its result, the first argument, exists.
stage() {
    local result=$1
    shift
    if [ -e "$result" ]; then return; fi
    echo "\$ open-lm $*"
    "$python" -m open_lm "$@" > "$folder/output.txt" 2>&1 || { tail -n 30 "$folder/output.txt" >&2; exit 1; }
}

# The same for `open-lm scaling run`, of whose output it shows the run that trains and the time estimates.
train() {
    local result=$1
    shift
    if [ -e "$result" ]; then return; fi
    echo "\$ open-lm scaling run $*"
    "$python" -m open_lm scaling run "$@" 2>&1 | tee "$folder/output.txt" |
        awk '/^\[[0-9]+\/|^about |^estimate|^warning|minutes$/ { print; fflush() }' ||
        { tail -n 30 "$folder/output.txt" >&2; exit 1; }
}

mkdir -p "$folder"
if [ ! -e "$folder/train.jsonl" ]; then
    "$python" "$root/scripts/e2e/ladder_data.py" "$folder" "$@" --text-mb "${TEXT_MB:-8}" --valid-kb "${VALID_KB:-96}"
fi
for split in train valid; do
    stage "$folder/$split/$shards/manifest.jsonl" preprocess --input-files "$folder/$split.jsonl" \
        --output-dir "$folder/$split" --tokenizer "$folder/tokenizer" --seqlen "$seq_len" --num-workers 1 \
        --shard-size 1000000
done

stage "$ladder/ladder.json" scaling plan "$ladder" --sizes "${sizes[@]}" --run-tokens "${run_tokens[@]}" \
    --target "${TARGET:-8e6:1e6}" --train-target --aspect 32 --vocab-size 264 --seq-len "$seq_len" \
    --global-batch-size "${BATCH:-8}" --lr "${LR:-6e-3}" --lr-exponent "${LR_EXPONENT:--0.25}" --set \
    "dataset_manifest=[\"$folder/train/$shards/manifest.jsonl\"]" data_key=npy workers=0 multiple_data_passes=true \
    "val_data=[\"$folder/valid/$shards/shard-0000000.tar\"]" "val_names=[text]" val_iter_ci=1000 \
    global_val_batch_size=32 "precision=${PRECISION:-amp_bfloat16}" checkpoint_format=sharded report=none energy=none

# The ladder, and the prediction.
train "$folder/runs.json" "$ladder" --estimate
stage "$folder/runs.json" scaling collect "$folder/runs.json" "$ladder" --train text
stage "$folder/fit.json" scaling fit "$folder/runs.json" --loss text --predict "$ladder" \
    --resamples "${RESAMPLES:-1000}" --output "$folder/fit.json"

# The target, and the comparison.
train "$folder/measured.json" "$ladder" --target
stage "$folder/measured.json" scaling collect "$folder/measured.json" "$ladder" --train text
stage "$folder/report.html" scaling report "$folder/fit.json" "$folder/report.html" --measured "$folder/measured.json"
if [ ! -e "$folder/result.json" ]; then
    "$python" -m open_lm scaling predict "$folder/fit.json" --measured "$folder/measured.json" --json \
        > "$folder/result.json.tmp"
    mv "$folder/result.json.tmp" "$folder/result.json"
fi
"$python" - "$folder/result.json" << 'END'
import json, sys

result = json.load(open(sys.argv[1], encoding="utf-8"))
(item,) = result["predictions"]
measured, (lower, upper) = item["measured"], item["loss_interval"]
print(f"predicted at {result['created']}: loss {item['loss']:.4f}, interval {lower:.4f} to {upper:.4f}")
print(f"trained from {measured['started']} to {measured['ended']}: loss {measured['loss']:.4f}")
print(f"relative error: {100 * measured['loss_difference']:+.2f} %")
END
