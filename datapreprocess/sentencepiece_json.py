"""A byte-fallback BPE model of sentencepiece written as a tokenizer.json, for tokenizers that read only those."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import chain
from typing import Any

# Field numbers of sentencepiece's ModelProto and its parts, and the kinds of pieces.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX_SPACE, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_SPACE = "▁"


class NotConvertible(ValueError):
    """The model does what a tokenizer.json cannot say; the message tells what."""


def convert(model: bytes) -> str:
    """A tokenizer.json that gives every text the ids that sentencepiece gives it.

    It has no added tokens: sentencepiece never finds control pieces, such as </s>, in a text.

    Raises NotConvertible for a model that is no plain byte-fallback BPE.
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
        }
    )


def _check(trainer: dict[int, Any], normalizer: dict[int, Any], pieces: list[tuple[str, float, int]]) -> None:
    kinds = {kind for _, _, kind in pieces}
    normal = {name for name, _, kind in pieces if kind == _NORMAL}
    reasons = {
        "it is no BPE model": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "it has no byte fallback": not trainer.get(_BYTE_FALLBACK, 0),
        "it puts spaces behind words": bool(trainer.get(_SUFFIX_SPACE, 0)),
        "it rewrites characters": bool(normalizer.get(_CHARSMAP, b"")),
        "it removes spaces": bool(normalizer.get(_REMOVE_SPACES, 1)),
        "it leaves spaces as they are": not normalizer.get(_ESCAPE_SPACES, 1),
        "it has user-defined or unused pieces": not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
        "it has no unknown piece": _UNKNOWN not in kinds,
        "two of its pieces are the same": len({name for name, _, _ in pieces}) < len(pieces),
        # fastokens finds a control or byte piece, such as <0x0A>, in a text one of whose characters is no piece, and
        # sentencepiece joins characters that are none.
        "characters of its pieces are no pieces": not {character for name, _, _ in pieces for character in name}
        <= normal,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise NotConvertible(" and ".join(found))


def _merges(order: dict[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """All ways to join two pieces into a third, best first.

    sentencepiece always joins the neighbours whose joint piece has the highest score; `order` sorts the pieces so.
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
    """The fields of the last part of this number; none where it is left out."""
    return dict(next((_fields(data) for found, data in reversed(parts) if found == number), []))


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a protocol buffer in their order: (number, an int, a float or bytes)."""
    return list(_walk(data))


def _walk(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        value: int | float | bytes
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 1:
            (value,), at = struct.unpack_from("<d", data, at), at + 8
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind == 5:
            (value,), at = struct.unpack_from("<f", data, at), at + 4
        else:
            raise NotConvertible(f"a field of it has the unknown kind {kind}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
