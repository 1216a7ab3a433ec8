"""The optimizer step of a training run, built from the trainer's flags, for benchmarks and loss curves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config
from open_lm.distributed.processes import init_runtime, shutdown
from open_lm.monitor.run_folder import RunPaths
from open_lm.training.build import build_parts, build_trainer
from open_lm.training.control import RunControl
from open_lm.training.guard import Guard
from open_lm.training.step import train_step


class OurStep:
    """The training step of a run that writes no files.

    `session` and `trainer` are those of the run, `model` is in training mode. As a context manager it leaves the
    process group on exit.
    """

    def __init__(self, flags: Sequence[str]) -> None:
        config = Config.from_namespace(parse_args(flags))
        runtime = init_runtime(config.parallel)
        self.session = build_parts(config, runtime, RunPaths("none", "bench"))
        self.trainer = build_trainer(self.session, RunControl())
        self._guard = Guard(config.faults, runtime, scaled=self.trainer.scaler is not None)
        self.model: nn.Module = self.session.model.train()

    def __enter__(self) -> OurStep:
        return self

    def __exit__(self, *_: object) -> None:
        shutdown(self.session.runtime)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Update the model from inputs and targets (B,T) int64 at the optimizer's current learning rate.

        Return the loss before the update, a float32 scalar.
        """
        trainer = self.trainer
        result = train_step(
            trainer.model,
            inputs,
            targets,
            trainer.optimizer,
            trainer.options,
            scaler=trainer.scaler,
            should_skip=self._guard.should_skip,
        )
        return result.values["loss"]
