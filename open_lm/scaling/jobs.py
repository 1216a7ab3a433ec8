"""Jobs of a ladder: train a run, or evaluate it on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from open_lm.config.command_line import load_config_file
from open_lm.errors import ConfigError, UserError
from open_lm.scaling.evaluation import AFTER_ALL, RESULTS, WHEN_KEY, evaluation_flags
from open_lm.scaling.ladder_files import Ladder, PlannedRun

if TYPE_CHECKING:
    from open_lm.report.records import Run

TRAIN, EVALUATE = "train", "evaluate"  # commands of open-lm
_MODULES = {TRAIN: "open_lm.main", EVALUATE: "open_lm.evaluate.command"}


@dataclass(frozen=True)
class Job:
    """A command of a ladder.

    Attributes:
        run: the run that it trains or evaluates.
        command: TRAIN or EVALUATE.
        flags: flags of the command.
    """

    run: PlannedRun
    command: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.run.name if self.command == TRAIN else f"{self.run.name}_{self.command}"

    @property
    def needs(self) -> str | None:
        """Name of the job that must finish first, or None."""
        return self.run.trunk if self.command == TRAIN else self.run.name

    @property
    def cost_flops(self) -> float:
        """FLOPs of the training; evaluations are not counted."""
        return self.run.cost_flops if self.command == TRAIN else 0.0

    def is_finished(self) -> bool:
        """Return whether the run has trained on all its tokens and validated, or whether its tasks are evaluated."""
        if self.command == EVALUATE:
            return (Path(self.run.folder) / RESULTS).is_file()
        return is_trained(self.run)

    @property
    def module(self) -> str:
        """Module whose `main(flags)` runs the job."""
        return _MODULES[self.command]

    def words(self, processes: int) -> list[str]:
        """Return the arguments of Python that start or continue the job in `processes` processes."""
        module = ["-m", self.module]
        if processes > 1:
            module = ["-m", "open_lm.utils.torchrun", "--nproc-per-node", str(processes), *module]
        return [*module, *self.flags]


def has_diverged(folder: str) -> bool:
    """Return whether a run stopped because its loss was not finite or did not recover."""
    failed = Path(folder) / "checkpoints_failed"
    return failed.is_dir() and any(failed.iterdir())


def is_trained(planned: PlannedRun) -> bool:
    """Return whether a run has trained on all its tokens, validated, and ended normally."""
    run = recorded_run(planned.folder)
    return run is not None and is_finished(run)


def recorded_run(folder: str) -> Run | None:
    """Return the records of a run, or None if it was not started or was killed before it wrote any."""
    from open_lm.report.collect import collect_run

    try:
        return collect_run(folder) if Path(folder).is_dir() else None
    except UserError:
        return None


def is_finished(run: Run) -> bool:
    """Return whether a run has trained, validated and saved its checkpoints, without being killed before the end."""
    from open_lm.report.records import FINISHED

    ends = run.metrics.get("train/epochs_done")[0]  # logged after the validation
    has_validated = len(ends) > 0 and int(ends[-1]) == run.summary.step
    return run.summary.state == FINISHED and has_validated and all(saved.is_complete for saved in run.checkpoints)


def training_job(planned: PlannedRun) -> Job:
    """Return the job that trains or continues a run.

    Raises:
        ConfigError: the job would write to another folder, because paths are relative to another working folder.
    """
    logs = str(load_config_file(planned.config).get("logs", ""))
    if (Path(logs) / planned.name).resolve() != Path(planned.folder).resolve():
        raise ConfigError(
            f"{planned.config}: found logs: {logs}, expected the folder {Path(planned.folder).parent}; start the "
            "command in the folder in which these files were written, and do not move them"
        )
    return Job(planned, TRAIN, ("--config", planned.config))


def jobs_of(ladder: Ladder, runs: Sequence[PlannedRun]) -> list[Job]:
    """Return the jobs of runs, each after the job that it needs; `runs` has trunks before branches."""
    training = list(map(training_job, runs))
    settings = ladder.evaluation
    if settings is None:
        return training
    evaluations = {
        planned.name: Job(planned, EVALUATE, tuple(evaluation_flags(settings, planned.folder))) for planned in runs
    }
    if settings[WHEN_KEY] == AFTER_ALL:
        return [*training, *evaluations.values()]
    return [job for item in training for job in (item, evaluations[item.run.name])]
