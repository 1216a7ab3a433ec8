#!/usr/bin/env bash
# SlimPajama, or a part of it, to shards: save it to disk, count each of its seven sources, tokenize.
#
#   scripts/e2e/slimpajama.sh FOLDER [flags of datapreprocess/make_2048.py]
#
# FOLDER/text/train and FOLDER/text/valid have one saved data set per source, for `datasets.load_from_disk`;
# FOLDER/shards/train and FOLDER/shards/valid have the shards. Start it again to continue: finished steps are kept.
# Variables: TRAIN (train[:10%]), VALID (validation), DATASET (cerebras/SlimPajama-627B, or a local folder of its
# files), STREAMING=1 to fetch only slices such as TRAIN=train[:10000], TOKENIZER, SEQLEN (2048).
set -euo pipefail
case ${1:-} in
    -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    "" | -*)
        echo "usage: $0 FOLDER [flags of make_2048.py]; --help explains them" >&2
        exit 2
        ;;
esac
folder=$1
shift
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
source "$here/python.sh"
export TOKENIZERS_PARALLELISM=false

streaming=()
if [ -n "${STREAMING:-}" ]; then streaming=(--streaming); fi
"$python" "$here/text.py" save --dataset "${DATASET:-cerebras/SlimPajama-627B}" --output "$folder/text" \
    --split "train=${TRAIN:-train[:10%]}" --split "valid=${VALID:-validation}" \
    --source-key meta.redpajama_set_name ${streaming[@]+"${streaming[@]}"}

"$python" "$here/text.py" count "$folder/text/train" "$folder/text/valid"

for split in train valid; do
    sources=()
    for saved in "$folder/text/$split"/*/; do
        sources+=(--source "$(basename "$saved")=${saved%/}")
    done
    "$python" "$root/datapreprocess/make_2048.py" --tokenizer "${TOKENIZER:-EleutherAI/gpt-neox-20b}" \
        --seqlen "${SEQLEN:-2048}" --output-dir "$folder/shards/$split" "${sources[@]}" "$@"
done
