"""Compare the times of the ranks, name the slowest one, and sum their energy.

Ranks exchange their times at log lines, where the host reads from the device anyway; steps exchange nothing more. A
rank's own time is that in which it waits for no other rank: waiting for data, forward pass and optimizer. In the
backward pass, and in `sums`, fast ranks wait for slow ones. With sharded parameters they also wait in the forward pass,
so that only differences in data and on the host show.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from open_lm.distributed.processes import Runtime
from open_lm.monitor.energy import JOULES_PER_KWH, EnergyMeter

PHASES = ("data", "sums", "forward", "backward", "optimizer")
_OWN_PHASES = ("data", "forward", "optimizer")
# A rank is a straggler if its own time is this much above the median and that is this share of a step.
_MIN_RATIO, _MIN_SHARE = 1.2, 0.05


class RankTimes:
    """The times of all ranks in a window of steps, and their sums since the start.

    Attributes:
        joules: energy of all ranks since the start of this process, as of the last log line.
    """

    def __init__(self, runtime: Runtime, meter: EnergyMeter | None = None, earlier_joules: float = 0.0) -> None:
        self._runtime, self._meter, self._earlier_joules = runtime, meter, earlier_joules
        self._totals = [[0.0] * len(PHASES) for _ in range(runtime.world_size)]
        self._steps, self._windows = 0, 0
        self._named: int | None = None  # the straggler that the last warning named
        self.joules = 0.0

    def exchange(self, seconds: Mapping[str, float], step_s: float, steps: int) -> dict[str, float]:
        """Exchange the times of a window with the other ranks; return metrics of all ranks. Collective.

        Args:
            seconds: this rank's mean time per step, by phase.
            step_s: mean duration of a step, with everything.
            steps: number of steps in the window.
        """
        rows = self._gather([*(seconds.get(phase, 0.0) for phase in PHASES), self._local_joules()])
        metrics = self._energy([row[-1] for row in rows])
        if len(rows) == 1:
            return metrics
        for total, row in zip(self._totals, rows, strict=True):
            for number in range(len(PHASES)):
                total[number] += row[number] * steps
        self._steps, self._windows = self._steps + steps, self._windows + 1
        own = [_own_time(row) for row in rows]
        slowest = max(range(len(own)), key=own.__getitem__)
        median = statistics.median(own)
        if self._windows > 1:  # the first window has the warmup of the devices and of the data workers
            self._warn(slowest, rows, median, step_s)
        return {
            **metrics,
            "perf/slowest_rank": slowest,
            "perf/slowest_rank_time": own[slowest],
            "perf/median_rank_time": median,
        }

    def exchange_energy(self) -> dict[str, float]:
        """Exchange only the energy with the other ranks; return it as a metric. Collective."""
        return self._energy([row[-1] for row in self._gather([self._local_joules()])])

    def _local_joules(self) -> float:
        return 0.0 if self._meter is None else self._meter.joules()

    def _energy(self, joules: Sequence[float]) -> dict[str, float]:
        self.joules = sum(joules)
        if self._meter is None:
            return {}
        return {"energy/kwh": (self._earlier_joules + self.joules) / JOULES_PER_KWH}

    def _gather(self, row: Sequence[float]) -> list[list[float]]:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [list(row)]
        local = torch.tensor(row, dtype=torch.float64, device=self._runtime.device)
        rows = local.new_empty(dist.get_world_size() * len(row))
        dist.all_gather_into_tensor(rows, local)
        return rows.view(-1, len(row)).tolist()

    def _warn(self, slowest: int, rows: Sequence[Sequence[float]], median: float, step_s: float) -> None:
        """Name the slowest rank if it delays the others, once until another rank does."""
        own = _own_time(rows[slowest])
        if own < _MIN_RATIO * median or own - median < _MIN_SHARE * step_s:
            self._named = None
            return
        if slowest == self._named:
            return
        self._named = slowest
        if self._runtime.is_master:
            times = ", ".join(f"{phase} {rows[slowest][PHASES.index(phase)]:.3f} s" for phase in _OWN_PHASES)
            logging.warning(
                f"{self._name(slowest)} is slow, and the others wait for it: {own:.3f} s of a step of {step_s:.3f} s "
                f"without waiting for other ranks ({times}); the median rank has {median:.3f} s"
            )

    def _name(self, rank: int) -> str:
        size = self._runtime.local_world_size
        return f"rank {rank}" if self._runtime.world_size <= size else f"rank {rank} (node {rank // size})"

    def table(self) -> str:
        """Return the mean times of all ranks as a table, the slowest rank first; "" for a single rank."""
        if self._runtime.world_size == 1 or not self._steps:
            return ""
        means = [[total / self._steps for total in row] for row in self._totals]
        order = sorted(range(len(means)), key=lambda rank: -_own_time(means[rank]))
        header = f"{'rank':>6} {'own':>9}" + "".join(f" {phase:>9}" for phase in PHASES)
        lines = [
            f"{rank:>6} {_own_time(means[rank]):>9.4f}" + "".join(f" {value:>9.4f}" for value in means[rank])
            for rank in order
        ]
        heading = f"Seconds per step of each rank, over {self._steps} steps (own: {', '.join(_OWN_PHASES)}):"
        return "\n".join([heading, header, *lines])


def _own_time(row: Sequence[float]) -> float:
    return sum(row[PHASES.index(phase)] for phase in _OWN_PHASES)
