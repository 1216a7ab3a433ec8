"""A small tokenizer, and shards that record it."""

from __future__ import annotations

import json
from pathlib import Path

from data_helpers import write_source

from open_lm import storage
from open_lm.tokenizer import Tokenizer, load_tokenizer


def write_tokenizer(path: Path, *, reverse: bool = False, indent: int | None = None) -> Tokenizer:
    """Write a tokenizer of bytes and the end-of-text tokens <|endoftext|> (id 256) and <|end|> (id 257)."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    fast = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True) for name in ("<|endoftext|>", "<|end|>")])
    path.write_text(json.dumps(json.loads(fast.to_str()), indent=indent))
    return load_tokenizer(str(path))


def write_data(folder: Path, tokenizer: Tokenizer, *, copy: bool = True, name: bool = True) -> str:
    """Write shards as the preprocessor does, with dataset.json and tokenizer/; return the manifest."""
    manifest = write_source(folder, [40, 40])
    settings = {"tokenizer": tokenizer.name if name else None, "tokenizer_fingerprint": tokenizer.fingerprint}
    settings |= {"eot_id": tokenizer.eot_id, "vocab_size": tokenizer.vocab_size}
    (folder / "dataset.json").write_text(json.dumps({"settings": settings, "inputs": []}))
    for file, content in tokenizer.files().items() if copy else ():
        storage.write_bytes(folder / "tokenizer" / file, content)
    return manifest
