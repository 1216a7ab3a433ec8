"""Store the result of each example of a task in a file, so that an evaluation that was killed continues.

A file belongs to one set of weights, one set of prompts and one set of settings: its name contains their hash. Its
first line describes them, and every other line is the result of an example. While an evaluation runs, every rank
appends to its own file. At the end rank 0 writes the results of all ranks to one file and removes the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_lm import storage
from open_lm.config.model_keys import MUP_KEYS
from open_lm.evaluate.icl.metrics import Record
from open_lm.model.parametrization import parametrization_of
from open_lm.storage.strict_json import to_json

VERSION = 1  # of the engine's results; a change that alters scores must raise it


class ResultStore:
    """The files with the results of examples, in a local or remote folder.

    Args:
        folder: folder of the files.
        facts: what the results depend on in addition to the prompts: hash of the weights, precision, architecture.
    """

    def __init__(self, folder: str, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.facts = {"version": VERSION, **facts}

    def path(self, label: str, shots: int, digest: str) -> str:
        """Return the path of the results of a task with prompts of this digest."""
        key = hashlib.sha256(to_json({**self.facts, "prompts": digest}, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w.-]+", "_", label)
        return storage.join(self.folder, f"{name}_{shots}shot_{key[:16]}.jsonl")

    def read(self, path: str) -> dict[int, Record]:
        """Return the stored results of a task by index of the example, those of unfinished evaluations included."""
        records: dict[int, Record] = {}
        for file in [path, *_parts(path)]:
            if storage.exists(file):
                records |= {record["index"]: record for record in _complete_lines(file)}
        return records

    def append(self, path: str, rank: int, records: Sequence[Record]) -> None:
        """Append the results of this rank. A remote folder keeps only finished results."""
        if storage.is_remote(path) or not records:
            return
        target = Path(storage.local_path(f"{path}.rank{rank}"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8") as file:
            # The line of an earlier process that was killed may be incomplete.
            file.write("".join(f"\n{to_json(record)}" for record in records) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, path: str, records: Mapping[int, Record], header: Mapping[str, Any]) -> None:
        """Write the results of all examples, in order, and remove the files of the ranks."""
        lines = [{**self.facts, **header}, *(records[index] for index in sorted(records))]
        storage.write_text(path, "".join(f"{to_json(line)}\n" for line in lines))
        for part in _parts(path):
            storage.remove(part)


def read_finished(path: str) -> tuple[dict[str, Any], list[Record]]:
    """Return the first line of a file of results, which describes them, and the results in order.

    Raises:
        ValueError: the first line is not such a description.
    """
    header = json.loads(next(iter(storage.read_lines(path)), ""))
    if not isinstance(header, dict):
        raise ValueError("the first line does not describe the results")
    return header, sorted(_complete_lines(path), key=lambda record: int(record["index"]))


def _parts(path: str) -> list[str]:
    """Return the files of ranks next to `path`."""
    if storage.is_remote(path):
        return []
    local = Path(storage.local_path(path))
    return [str(file) for file in sorted(local.parent.glob(f"{local.name}.rank*"))]


def _complete_lines(path: str) -> Iterable[Record]:
    """Yield the results in a file. The last line of a killed process may be incomplete."""
    for line in storage.read_lines(path):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("index"), int):
            yield record


def weights_hash(model: nn.Module) -> str:
    """Return the sha256 (hex) of a model's parameters: names, types, shapes and values. Equal for every file format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters(), key=lambda item: item[0]):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored_facts(model: nn.Module, weights: str, precision: str) -> Mapping[str, Any]:
    """Return what stored results depend on: the hash of the weights, the precision and the architecture."""
    params = getattr(model, "params", None)
    architecture = {} if params is None else {key: str(value) for key, value in sorted(vars(params).items())}
    left_out = ["attn_func", "norm_type"]  # their names contain addresses; attn_name and model_norm select them
    left_out += MUP_KEYS if parametrization_of(model).is_standard else []  # as in results of earlier versions
    architecture = {key: value for key, value in architecture.items() if key not in left_out}
    return {"weights": weights, "precision": precision, "architecture": architecture}
