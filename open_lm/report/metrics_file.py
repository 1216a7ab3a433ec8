"""Read metrics.jsonl into columns: a million lines in seconds, without an object per value."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.report.records import Metric, Metrics

_BLOCK_BYTES = 32 << 20
_COMMON = ("step", "time", "tokens")  # columns of all lines; not metrics


def read_metrics(url: str) -> Metrics:
    """Read a metrics.jsonl. Lines that are not JSON objects with a step are counted and left out.

    Raises:
        StorageError: the file cannot be read.
    """
    columns = MetricColumns()
    with open_lines(url) as file:
        while lines := file.readlines(_BLOCK_BYTES):
            columns.add_lines(lines)
    return columns.finish()


class MetricColumns:
    """Columns of the values of lines, which are appended in blocks."""

    def __init__(self) -> None:
        self._common: list[np.ndarray] = []  # (n, 3): step, time, tokens
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self._num_rows = self._num_damaged = 0

    def add_lines(self, lines: Iterable[bytes]) -> None:
        """Append lines of JSON."""
        records = []
        for line in lines:
            try:
                record = orjson.loads(line)
                if type(record["step"]) is not int:
                    raise ValueError
            except (ValueError, KeyError, TypeError, IndexError):
                self._num_damaged += bool(line.strip())
                continue
            records.append(record)
        self.add_records(records)

    def add_records(self, records: Iterable[dict[str, Any]]) -> None:
        """Append the values of lines, each with its step."""
        groups: dict[tuple[str, ...], tuple[list[int], list[Any]]] = {}
        row = self._num_rows
        for record in records:
            names = tuple(record)
            group = groups.get(names)
            if group is None:
                group = groups[names] = ([], [])
            group[0].append(row)
            group[1].append([*record.values()])
            row += 1
        common = np.full((row - self._num_rows, 3), np.nan)
        for names, (rows, values) in groups.items():
            self._add_block(names, np.array(rows, dtype=np.int32), values, common)
        self._common.append(common)
        self._num_rows = row

    def _add_block(self, names: tuple[str, ...], rows: np.ndarray, values: list[Any], common: np.ndarray) -> None:
        """Append lines with the same keys: their columns become arrays at once. Sets their rows of `common`."""
        try:
            block = np.array(values, dtype=np.float64)
        except (ValueError, TypeError):  # a text or a list among the values
            block = np.array([[_number(value) for value in line] for line in values], dtype=np.float64)
        columns = dict(zip(names, block.T, strict=True))
        columns.setdefault("tokens", columns.get("train/tokens", np.full(len(rows), np.nan)))
        for position, name in enumerate(_COMMON):
            if name in columns:
                common[rows - self._num_rows, position] = columns.pop(name)
        for name, column in columns.items():
            self._parts[name].append((rows, column.astype(np.float32)))

    def finish(self) -> Metrics:
        """Return the columns, ordered by step. Metrics without a single number are left out."""
        if not self._num_rows:
            return Metrics(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), {}, self._num_damaged)
        common = np.concatenate(self._common)
        steps = common[:, 0].astype(np.int64)
        order = np.argsort(steps, kind="stable")
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        metrics = {}
        for name, parts in self._parts.items():
            rows, values = place[np.concatenate([r for r, _ in parts])], np.concatenate([v for _, v in parts])
            by_row = np.argsort(rows, kind="stable")
            values[~np.isfinite(values)] = np.nan
            if np.isfinite(values).any() or name == "train/loss":
                metrics[name] = Metric(rows[by_row], values[by_row])
        return Metrics(steps[order], common[order, 1], common[order, 2], metrics, self._num_damaged)


def open_lines(url: str) -> IO[bytes]:
    """Open a file for reading its lines. A remote one is fetched completely, which takes fewer requests."""
    return io.BytesIO(storage.read_bytes(url)) if storage.is_remote(url) else open(storage.local_path(url), "rb")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
