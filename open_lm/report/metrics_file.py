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
_COMMON = ("step", "time", "tokens")  # of all lines, not metrics


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

    def add_records(self, records: list[dict[str, Any]]) -> None:
        """Append the values of lines, each with its step."""
        if not records:
            return
        self._common.append(np.array([_place(record) for record in records], dtype=np.float64))
        groups: dict[tuple[str, ...], tuple[list[int], list[Any]]] = {}
        for row, record in enumerate(records, start=self._num_rows):
            rows, values = groups.setdefault(tuple(record), ([], []))
            rows.append(row)
            values.append(tuple(record.values()))
        self._num_rows += len(records)
        for names, (rows, values) in groups.items():
            self._add_block(names, np.array(rows, dtype=np.int32), values)

    def _add_block(self, names: tuple[str, ...], rows: np.ndarray, values: list[Any]) -> None:
        """Append lines with the same keys: their columns become arrays at once."""
        try:
            block = np.array(values, dtype=np.float64)
        except (ValueError, TypeError):  # a text or a list among the values
            block = np.array([[_number(value) for value in line] for line in values], dtype=np.float64)
        for name, column in zip(names, block.T, strict=True):
            if name not in _COMMON:
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


def _place(record: dict[str, Any]) -> tuple[int, float | None, float | None]:
    """Return step, time and tokens of a line."""
    tokens = record.get("tokens", record.get("train/tokens"))
    return record["step"], _number(record.get("time")), _number(tokens)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
