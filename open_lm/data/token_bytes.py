"""Count the bytes of text per token id, for losses in bits per byte, which do not depend on the tokenizer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from open_lm.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer

_SPACE = "\u2581"  # in place of a space in the pieces of sentencepiece
_BYTE_PIECE_LENGTH = len("<0x00>")


def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the number of UTF-8 bytes of each token: (vocab_size,) int32, 0 for special tokens and unused ids.

    None for tokenizers that do not encode the bytes of a text, such as those that replace unknown words. The space that
    sentencepiece adds before a text counts.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_sentencepiece(tokenizer)
    return _of_json(tokenizer) if isinstance(tokenizer, JsonTokenizer) else None


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> np.ndarray:
    processor = tokenizer._loaded
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int32)
    for index in range(tokenizer.vocab_size):
        if processor.is_byte(index):
            counts[index] = 1
        elif not (processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index)):
            counts[index] = _text_bytes(processor.id_to_piece(index))
    return counts


def _of_json(tokenizer: JsonTokenizer) -> np.ndarray | None:
    content = json.loads(tokenizer.source)
    decoders = {step.get("type") for step in _steps(content.get("decoder"))}
    is_byte_level, has_bytes = "ByteLevel" in decoders, "ByteFallback" in decoders
    if not (is_byte_level or has_bytes):
        return None
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int32)
    for token, index in content["model"]["vocab"].items():
        if is_byte_level:
            counts[index] = len(token)  # each character of the vocabulary encodes one byte
        elif len(token) == _BYTE_PIECE_LENGTH and token.startswith("<0x") and token.endswith(">"):
            counts[index] = 1
        else:
            counts[index] = _text_bytes(token)
    for token in content.get("added_tokens", []):
        is_special = token["special"] or token["id"] in (tokenizer.eot_id, tokenizer.bos_id)
        counts[token["id"]] = 0 if is_special else len(token["content"].encode())
    return counts


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a decoder, which may be one step or a sequence of them."""
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _text_bytes(piece: str) -> int:
    return len(piece.replace(_SPACE, " ").encode())
