"""The step of training as a run has it: session, model, optimizer and options, made from the trainer's own flags."""

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
    """A run in this process that writes nothing; `model` is in training mode. Leaves its process group at the end of
    a `with` block."""

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
        """One update from inputs and targets (B,T) int64, at the learning rate that the optimizer has; returns the loss
        before it, a float32 scalar."""
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
