"""Convert a byte-fallback BPE model of sentencepiece to a tokenizer.json, for libraries that read only that format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import chain
from typing import Any

# Field numbers of sentencepiece's ModelProto and its nested messages, and the types of pieces.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX_SPACE, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_SPACE = "▁"


class NotConvertible(ValueError):
    """A model that a tokenizer.json cannot express; the message gives the reason."""


def convert(model: bytes) -> str:
    """Return a tokenizer.json that encodes every text as sentencepiece does.

    It has no added tokens, because sentencepiece never matches control pieces, such as </s>, in a text.

    Raises NotConvertible for a model that is not a plain byte-fallback BPE model.
    """
    parts = _fields(model)
    trainer, normalizer = _last(parts, _TRAINER), _last(parts, _NORMALIZER)
    pieces = [_piece(data) for number, data in parts if number == _PIECES]
    _check(trainer, normalizer, pieces)
    vocab = {name: i for i, (name, _, _) in enumerate(pieces)}
    escape: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = {"type": "Prepend", "prepend": _SPACE}
    steps = [prefix, escape] if normalizer.get(_DUMMY_PREFIX, 1) else [escape]
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(name for name, _, kind in pieces if kind == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": _merges({name: (-score, i) for i, (name, score, kind) in enumerate(pieces) if kind == _NORMAL}),
    }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "model": bpe,
        },
        allow_nan=False,
    )


def _check(trainer: dict[int, Any], normalizer: dict[int, Any], pieces: list[tuple[str, float, int]]) -> None:
    kinds = {kind for _, _, kind in pieces}
    normal = {name for name, _, kind in pieces if kind == _NORMAL}
    reasons = {
        "it is not a BPE model": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "it has no byte fallback": not trainer.get(_BYTE_FALLBACK, 0),
        "it adds spaces after words": bool(trainer.get(_SUFFIX_SPACE, 0)),
        "it normalizes characters": bool(normalizer.get(_CHARSMAP, b"")),
        "it removes spaces": bool(normalizer.get(_REMOVE_SPACES, 1)),
        "it does not escape spaces": not normalizer.get(_ESCAPE_SPACES, 1),
        "it has user-defined or unused pieces": not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
        "it has no unknown piece": _UNKNOWN not in kinds,
        "it has duplicate pieces": len({name for name, _, _ in pieces}) < len(pieces),
        # If a character of a control or byte piece, such as <0x0A>, is not a piece, then fastokens matches that piece
        # in texts. And sentencepiece merges characters that are not pieces.
        "some characters of its pieces are not pieces": not {character for name, _, _ in pieces for character in name}
        <= normal,
    }
    problems = [reason for reason, applies in reasons.items() if applies]
    if problems:
        raise NotConvertible(" and ".join(problems))


def _merges(order: dict[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that merge into a third piece, best first.

    sentencepiece always merges the adjacent pair whose merged piece has the highest score; `order` maps pieces to their
    sort keys.
    """
    halves = (
        sorted(
            (
                (name[:cut], name[cut:])
                for cut in range(1, len(name))
                if name[:cut] in order and name[cut:] in order
            ),
            key=lambda pair: (order[pair[0]][1], order[pair[1]][1]),
        )
        for name in sorted(order, key=order.__getitem__)
    )  # fmt: skip
    return list(chain.from_iterable(halves))


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    return fields[_PIECE].decode(), fields.get(_SCORE, 0.0), fields.get(_TYPE, _NORMAL)


def _last(parts: list[tuple[int, Any]], number: int) -> dict[int, Any]:
    """Return the fields of the last nested message with this number; empty if there is none."""
    return dict(next((_fields(data) for key, data in reversed(parts) if key == number), []))


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """Return the fields of a protocol buffer in order, as (number, int, float or bytes) pairs."""
    return list(_iter_fields(data))


def _iter_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        value: int | float | bytes
        if kind == 0:
            value, position = _varint(data, position)
        elif kind == 1:
            (value,), position = struct.unpack_from("<d", data, position), position + 8
        elif kind == 2:
            size, position = _varint(data, position)
            value, position = data[position : position + size], position + size
        elif kind == 5:
            (value,), position = struct.unpack_from("<f", data, position), position + 4
        else:
            raise NotConvertible(f"it has a field of the unknown wire type {kind}")
        yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Decode a varint; return its value and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
