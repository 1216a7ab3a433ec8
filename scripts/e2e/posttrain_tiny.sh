#!/usr/bin/env bash
# The stages after pretraining on a tiny model, offline: pretrain -> SFT -> DPO -> GRPO -> distil to a smaller model, and
# an evaluation of each stage. Takes about 4 minutes of CPU time.
#
#   scripts/e2e/posttrain_tiny.sh FOLDER
#
# Start it again to continue after an interruption: a stage whose result exists is skipped. Sizes can be set in the
# environment: DOCUMENTS, PRETRAIN_TOKENS, SFT_PASSES, DPO_PASSES, GRPO_STEPS, DISTIL_PASSES, SEED.
set -euo pipefail
if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
folder=$1
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
seed=${SEED:-0}
sft_passes=${SFT_PASSES:-16}
distil_passes=${DISTIL_PASSES:-30}

# Print a command, and run it unless its result, the first argument, exists.
stage() {
    local result=$1
    shift
    if [ -e "$result" ]; then return; fi
    echo "\$ python $*"
    "$python" "$@" > "$folder/output.txt" 2>&1 || { tail -n 30 "$folder/output.txt" >&2; exit 1; }
}

mkdir -p "$folder"
common=(--tokenizer "$folder/tokenizer" --seqlen 64 --num-workers 1)
train=(-m open_lm.main --workers 0 --precision fp32 --multiple-data-passes --seed "$seed" --logs "$folder")

stage "$folder/student.json" "$root/scripts/e2e/posttrain_data.py" "$folder" --documents "${DOCUMENTS:-2000}"

# Pretraining: a model that counts.
stage "$folder/text/64-v1/0/manifest.jsonl" "$root/datapreprocess/make_2048.py" \
    --input-files "$folder/pretrain.jsonl" --output-dir "$folder/text" "${common[@]}"
stage "$folder/pretrain/checkpoints/epoch_1.pt" "${train[@]}" --name pretrain \
    --model "$folder/model.json" --dataset-manifest "$folder/text/64-v1/0/manifest.jsonl" --data-key npy \
    --train-num-samples "${PRETRAIN_TOKENS:-204800}" --epochs 1 --global-batch-size 32 --lr 3e-3 --warmup 20 --wd 0.1

# Supervised fine-tuning on 200 conversations about sums, with two styles of answers.
stage "$folder/chats/dataset.json" "$root/datapreprocess/make_sft.py" \
    --input-files "$folder/chats.jsonl" --output-dir "$folder/chats" --chat-template chatml "${common[@]}"
stage "$folder/sft/checkpoints/epoch_$sft_passes.pt" "${train[@]}" --name sft --recipe sft \
    --pretrained "$folder/pretrain" --dataset-manifest "$folder/chats/manifest.jsonl" \
    --epochs "$sft_passes" --global-batch-size 16 --lr 3e-3

# Preferences: one style of answers.
stage "$folder/dpo/checkpoints/model.json" -m open_lm.finetune.dpo --name dpo --logs "$folder" --seed "$seed" \
    --pretrained "$folder/sft" --train-data "$folder/pairs.jsonl" --val-data "$folder/held_out_pairs.jsonl" \
    --global-batch-size 32 --lr 1e-4 --warmup 2 --epochs "${DPO_PASSES:-2}" --resume latest

# Rewards: right answers.
stage "$folder/grpo/checkpoints/model.json" -m open_lm.finetune.grpo --name grpo --logs "$folder" --seed "$seed" \
    --pretrained "$folder/dpo" --train-data "$folder/prompts.jsonl" --reward exact_match \
    --global-batch-size 128 --num-generations 8 --max-completion-tokens 16 --lr 3e-4 --lr-scheduler constant \
    --max-steps "${GRPO_STEPS:-60}" --save-every-n-steps 20 --resume latest

# Distillation: a model of a quarter of the size learns from the answers and the probabilities of the last stage.
stage "$folder/traces.jsonl" "$root/scripts/e2e/posttrain_report.py" "$folder" "$folder/grpo" \
    --traces "$folder/traces.jsonl"
stage "$folder/traces/dataset.json" "$root/datapreprocess/make_sft.py" \
    --input-files "$folder/traces.jsonl" --output-dir "$folder/traces" --chat-template chatml "${common[@]}"
stage "$folder/distil/checkpoints/epoch_$distil_passes.pt" "${train[@]}" --name distil --recipe sft \
    --model "$folder/student.json" --dataset-manifest "$folder/traces/manifest.jsonl" \
    --distill-model "$folder/grpo/checkpoints/model.json" \
    --distill-pretrained "$folder/grpo/checkpoints/epoch_0.pt" --distill-precision fp32 \
    --epochs "$distil_passes" --global-batch-size 16 --lr 3e-3

runs=(pretrain sft dpo grpo distil)
stage "$folder/stages.json" "$root/scripts/e2e/posttrain_report.py" "$folder" "${runs[@]/#/$folder/}"
grep '^|' "$folder/output.txt"
