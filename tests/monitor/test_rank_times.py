"""The slowest rank is named in metrics and log, and the energy of all ranks is summed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import rank_processes
import torch.distributed as dist

from open_lm.distributed.processes import Runtime
from open_lm.monitor.rank_times import RankTimes


class Meter:
    method, is_estimate = "given", False

    def __init__(self, joules: float) -> None:
        self._joules = joules

    def joules(self) -> float:
        return self._joules

    def close(self) -> None:
        """Do nothing."""


def exchange(rank: int, folder: Path) -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    times = RankTimes(Runtime(rank, rank, 3, 2), Meter(100.0 * rank), earlier_joules=7.2e6)
    rows = []
    for forward_of_rank_1 in (0.4, 0.4, 0.4, 0.1, 0.4):  # the first window is the warmup
        own = {"data": 0.01, "forward": forward_of_rank_1 if rank == 1 else 0.1, "optimizer": 0.02, "backward": 0.3}
        rows.append(times.exchange(own, 1.0, steps=10))
    table = times.table()
    (folder / f"{rank}.json").write_text(json.dumps([rows, messages, table, times.joules]))
    dist.barrier()


@pytest.mark.processes
def test_the_slowest_of_several_ranks_is_named_once_until_it_recovers(tmp_path: Path) -> None:
    rank_processes.on_ranks(exchange, tmp_path, 3)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    rows, messages, table, joules = results[0]
    assert [result[0] for result in results] == [rows] * 3, "all ranks have the same metrics"
    assert rows[0]["perf/slowest_rank"] == 1 and rows[0]["perf/slowest_rank_time"] == pytest.approx(0.43)
    assert rows[0]["perf/median_rank_time"] == pytest.approx(0.13)
    assert joules == 300 and rows[0]["energy/kwh"] == pytest.approx((7.2e6 + 300) / 3.6e6)
    assert len(messages) == 2 and results[1][1] == [], "rank 0 warns again after the rank has recovered"
    assert "rank 1 (node 0) is slow, and the others wait for it: 0.430 s of a step of 1.000 s" in messages[0]
    assert "forward 0.400 s" in messages[0]
    assert table.splitlines()[0].startswith("Seconds per step of each rank, over 50 steps")
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["1", "0", "2"]


def test_a_single_rank_has_energy_only() -> None:
    times = RankTimes(Runtime(), Meter(3.6e6))
    assert times.exchange({"data": 0.1}, 1.0, steps=1) == {"energy/kwh": 1.0} and times.table() == ""
    assert RankTimes(Runtime()).exchange({"data": 0.1}, 1.0, steps=1) == {}
