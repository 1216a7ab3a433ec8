"""A small tokenizer with the tokens of chat templates, conversations, and what shards of them hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_lm.data.shard_format import decode_member, index_shard
from open_lm.data.token_flags import ID_MASK, NOT_TRAINED, STARTS_DOCUMENT
from open_lm.finetune.sft_data import main as make_sft

PAD = 0xFFFFFFFF
TOKENS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "enough"},
]


def write_chat_tokenizer(folder: Path, template: str | None = None) -> Path:
    """Write a tokenizer of bytes and TOKENS that begins every text with <s>, as those of Llama do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in TOKENS])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(fast.to_str())
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def make_data(folder: Path, tokenizer: Path, inputs: Sequence[Path], *flags: str, seq_len: int = 300) -> dict[str, Any]:
    """Make the data set `folder` with the template chatml, unless `flags` choose another; return its dataset.json."""
    words = ["--input-files", *map(str, inputs), "--output-dir", str(folder), "--tokenizer", str(tokenizer)]
    template = [] if "--chat-template" in flags else ["--chat-template", "chatml"]
    make_sft([*words, "--seqlen", str(seq_len), *template, *flags])
    record: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
    return record


def stored_sequences(folder: Path) -> list[np.ndarray]:
    """Return the sequences of a data set in the order of its shards, uint32 (T,) each."""
    sequences = []
    for path in sorted(folder.glob("*.tar")):
        data = path.read_bytes()
        for member in index_shard(data, str(path)):
            ids = decode_member(data[member.offset : member.offset + member.size], member.kind)
            sequences.append(ids.astype(np.uint32))
    return sequences


def stored_conversations(folder: Path) -> list[tuple[list[int], list[bool]]]:
    """Return the ids of all packed conversations, and which are trained, sorted."""
    found = []
    for sequence in stored_sequences(folder):
        tokens = sequence[sequence != PAD]
        starts = np.flatnonzero(tokens & STARTS_DOCUMENT)
        assert starts[0] == 0 and (sequence[len(tokens) :] == PAD).all()
        for part in np.split(tokens, starts[1:]):
            found.append(((part & ID_MASK).tolist(), (part < NOT_TRAINED).tolist()))
    return sorted(found)
