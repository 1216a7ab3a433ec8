"""The tokenizer of a model that is imported from, or exported to, a folder in the format of transformers."""

from __future__ import annotations

import json
import logging
from typing import Any

from open_lm import storage
from open_lm.data.tokenizers import find_run_tokenizer
from open_lm.errors import ConfigError
from open_lm.hf.folders import GENERATION_CONFIG, read_json, write_json
from open_lm.hf.tokenization import load_hf_tokenizer
from open_lm.tokenizer import (
    CONFIG_NAME,
    COPY_FOLDER,
    FILE_NAMES,
    JSON_NAME,
    MODEL_NAME,
    Tokenizer,
    tokenizer_from_files,
)

_TOKENS_MAP = "special_tokens_map.json"
# Further files of a tokenizer that transformers reads.
_OTHER_FILES = (_TOKENS_MAP, "added_tokens.json", "vocab.json", "merges.txt")


def import_tokenizer(folder: str, output: str, num_rows: int) -> bool:
    """Copy the tokenizer of a folder to `output`/tokenizer; return whether there is one, else log a warning.

    Raises:
        ConfigError: an unusable tokenizer, or one with more ids than the model has rows.
    """
    existing = {info.url.rpartition("/")[2] for info in storage.list_infos(folder)}
    files = {
        name: storage.read_bytes(storage.join(folder, name))
        for name in (*FILE_NAMES, *_OTHER_FILES)
        if name in existing
    }
    if JSON_NAME not in files and MODEL_NAME not in files:
        logging.warning(f"{folder}: has neither {JSON_NAME} nor {MODEL_NAME}; importing no tokenizer")
        return False
    tokenizer = tokenizer_from_files(files, folder, _eos_token(files))
    if tokenizer.vocab_size > num_rows:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, but the embedding only {num_rows} rows, "
            f"{tokenizer.vocab_size - num_rows} too few; import the model with its own tokenizer"
        )
    for name, content in {**files, CONFIG_NAME: tokenizer.files()[CONFIG_NAME]}.items():
        storage.write_bytes(storage.join(output, COPY_FOLDER, name), content)
    return True


def _eos_token(files: dict[str, bytes]) -> str | None:
    """Return the end-of-text token of special_tokens_map.json; None if tokenizer_config.json names it."""
    for name in (CONFIG_NAME, _TOKENS_MAP):
        content = json.loads(files[name]) if name in files else {}
        token = content.get("eos_token") if isinstance(content, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return None if name == CONFIG_NAME else token
    return None


def export_tokenizer(checkpoint: str, tokenizer: Tokenizer | None, output: str, seq_len: int) -> dict[str, Any]:
    """Write the tokenizer of a run in the format of transformers, and return the model's generation settings.

    Args:
        checkpoint: a checkpoint of the run.
        tokenizer: the tokenizer to use; None for that of the run. Without any, only log a warning.
        output: folder or URL to write to.
        seq_len: the longest text, in tokens.

    Returns:
        the content of generation_config.json: at least the ids of the tokens that begin, end and pad a text. Those of
        an imported model are unchanged, like the files of its tokenizer.
    """
    run = find_run_tokenizer(checkpoint) if tokenizer is None else None
    root = _imported_root(checkpoint)
    if root is not None and tokenizer is None:
        for info in storage.list_infos(storage.join(root, COPY_FOLDER)):
            storage.copy(info.url, storage.join(output, info.url.rpartition("/")[2]))
        return read_json(storage.join(root, GENERATION_CONFIG))
    if run is not None:
        tokenizer = run.load()
    if tokenizer is None:
        logging.warning(f"{checkpoint}: the run records no tokenizer; export it with --tokenizer")
        return {}
    _write(tokenizer, output, seq_len)
    return {
        **({} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}),
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": tokenizer.eot_id,
    }


def _imported_root(checkpoint: str) -> str | None:
    """Return the folder of an imported model that a checkpoint is in."""
    root = checkpoint.rstrip("/").rpartition("/")[0] or "."
    return root if storage.info(storage.join(root, GENERATION_CONFIG)) is not None else None


def _write(tokenizer: Tokenizer, output: str, seq_len: int) -> None:
    """Write tokenizer.json and its configuration, with which transformers gives the ids of the training data."""
    hf_tokenizer = load_hf_tokenizer(tokenizer)
    end = tokenizer.token(tokenizer.eot_id)
    settings: dict[str, Any] = {
        **{name: tokenizer.config[name] for name in ("chat_template",) if name in tokenizer.config},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": seq_len,
        **({} if tokenizer.bos_id is None else {"bos_token": tokenizer.token(tokenizer.bos_id)}),
        "eos_token": end,
        "pad_token": end,
    }
    storage.write_text(storage.join(output, JSON_NAME), hf_tokenizer.backend_tokenizer.to_str(pretty=True))
    write_json(storage.join(output, CONFIG_NAME), settings)
