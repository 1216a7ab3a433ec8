"""Create a small random llama with a tokenizer of bytes, in the format of transformers.

    python scripts/examples/tiny_llama.py FOLDER

FOLDER also gets model.json, the model configuration that its import must have.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from open_lm.errors import ConfigError, run_cli
from open_lm.storage import write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

HIDDEN_DIM, LAYERS, HEADS, FFN_DIM, VOCAB_SIZE = 32, 2, 4, 64, 260
SPECIAL_TOKENS = ["<s>", "</s>"]


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of the 256 bytes, and of tokens that begin and end a text as in LLaMA-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = SPECIAL_TOKENS
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end).save_pretrained(folder)


def save_model(folder: Path, seq_len: int) -> None:
    """Save a float32 llama with random weights, which depend on nothing but the sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=HIDDEN_DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS, rms_norm_eps=1e-5,
        intermediate_size=FFN_DIM, vocab_size=VOCAB_SIZE, max_position_embeddings=seq_len, bos_token_id=0,
        eos_token_id=1, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="folder to write; it must not exist")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens of a sequence (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; remove it, or choose another folder")
    unfinished = folder.with_name(folder.name + ".incomplete")
    save_tokenizer(unfinished)
    save_model(unfinished, args.seq_len)
    keys = {"hidden_dim": HIDDEN_DIM, "n_layers": LAYERS, "n_heads": HEADS, "seq_len": args.seq_len}
    keys |= {"ffn_dim": FFN_DIM, "vocab_size": VOCAB_SIZE, "post_embed_norm": False, "weight_tying": False}
    write_text(unfinished / "model.json", to_json({**keys, "model_norm": "rms_norm"}))
    os.rename(unfinished, folder)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
