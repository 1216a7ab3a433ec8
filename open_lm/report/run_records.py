"""What a run records about itself for people: environment.json with energy, tokens and FLOPs, and report.html."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from open_lm import storage
from open_lm.distributed.processes import Runtime
from open_lm.monitor import environment
from open_lm.monitor.energy import EnergyMeter, open_meter
from open_lm.monitor.environment import EnvironmentFile
from open_lm.monitor.loggers import log_to_file
from open_lm.monitor.rank_times import RankTimes
from open_lm.monitor.run_folder import RunPaths
from open_lm.report.refresh import RunReport


class RunRecords:
    """The records of a run. Create it on all ranks; rank 0 writes the files.

    Args:
        paths, runtime: the run and this rank.
        settings: has the values of --report and --energy.
        step: the step from which this start continues.
        data: the content of data.json, if there are training data.

    Attributes:
        rank_times: exchanges the times and the energy of the ranks.
        progress: returns what this start has done: "step", "tokens", "flops".
    """

    def __init__(
        self,
        paths: RunPaths,
        runtime: Runtime,
        settings: Any,
        *,
        step: int,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        writes = runtime.is_master and paths.enabled
        self._meter: EnergyMeter | None = open_meter(settings.energy, runtime)
        self._environment = EnvironmentFile(
            storage.join(paths.root, environment.FILE_NAME) if writes else None,
            environment.describe(runtime, step, data),
        )
        self._report = RunReport(paths.root if writes and settings.report != "none" else None)
        self._start = time.monotonic()
        self.rank_times = RankTimes(runtime, self._meter, self._environment.earlier("progress", "energy_joules"))
        self.progress: Callable[[], dict[str, Any]] = dict

    def update(self) -> None:
        """Record the progress and refresh the report; call it at each checkpoint. Never fails."""
        self._record_progress()
        self._report.refresh()

    def finish(self) -> None:
        """Record the end of this start and write the final report. Never fails."""
        if self._meter is not None:
            self._meter.close()
        self._record_progress()
        if table := self.rank_times.table():
            log_to_file(table)
        self._report.finish()

    def _record_progress(self) -> None:
        energy: dict[str, Any] = {}
        if self._meter is not None:  # this rank's meter may be ahead of the last exchange
            energy = {
                "energy_joules": round(max(self.rank_times.joules, self._meter.joules()), 3),
                "energy_method": self._meter.method,
                "energy_is_estimate": self._meter.is_estimate,
            }
        seconds = round(time.monotonic() - self._start, 3)
        self._environment.update({"seconds": seconds, **self.progress(), **energy})
