"""Trainers of TRL that belong to a run: metrics under our names, times of phases, checkpoints, signals."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from open_lm import storage
from open_lm.distributed.processes import sum_over_ranks
from open_lm.errors import ConfigError, UserError
from open_lm.hf.folders import write_json
from open_lm.hf.policy import balancing_loss, load_policy
from open_lm.monitor.loggers import MetricLoggers
from open_lm.monitor.timing import PhaseClock, Stopwatch
from open_lm.report.run_records import RunRecords

if TYPE_CHECKING:
    from open_lm.finetune.tuning_run import TuningRun

COMPLETE = "complete.json"  # written last into a checkpoint for --resume; has the token count, which TRL does not save
# Our names of TRL's metrics. Others get the prefix train/ or val/ only.
_NAMES = {
    **{"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "num_tokens": "tokens"},
    **{"rewards/margins": "margin", "rewards/accuracies": "accuracy", "logps/chosen": "logp_chosen"},
    **{"rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected", "logps/rejected": "logp_rejected"},
    **{"completions/mean_length": "completion_tokens", "completions/clipped_ratio": "completions_cut"},
}
_REWARD_MEAN = re.compile(r"rewards/(.+)/mean")
# Metrics that describe the machine or repeat others.
_OMITTED = re.compile(
    r"epoch|(train_)?runtime|.*_per_second|total_flos|model_preparation_time|train_loss|clip_ratio/.*|logits/.*"
)
_SHOWN = ("loss", "lr", "margin", "accuracy", "reward", "kl", "entropy", "completion_tokens")  # on the console


def our_names(values: Mapping[str, float]) -> dict[str, float]:
    """Return metrics of TRL under our names: "loss" as "train/loss", "eval_rewards/margins" as "val/margin"."""
    renamed = {}
    for key, value in values.items():
        prefix, name = ("val", key.removeprefix("eval_")) if key.startswith("eval_") else ("train", key)
        if _OMITTED.fullmatch(name) or not isinstance(value, int | float):
            continue
        reward = _REWARD_MEAN.fullmatch(name)
        renamed[f"{prefix}/{f'reward/{reward[1]}' if reward else _NAMES.get(name, name)}"] = value
    return renamed


def with_run(trainer_class: type, run: TuningRun) -> type:
    """Return a subclass of a trainer of TRL that belongs to a run.

    It logs to the loggers of the run, with the times of the phases of a step, stops at a signal after saving, marks
    complete checkpoints, adds the load-balancing loss of models of model_type openlm, and loads reference models like
    `load_policy`.
    """

    class RunTrainer(trainer_class):
        metric_loggers = MetricLoggers()
        records: RunRecords | None = None
        earlier = (0, 0.0)  # tokens and FLOPs of earlier starts
        stop_requested = False
        timed_step = 0  # the last step whose times were recorded
        round_steps = 1  # steps that share one round of samples, which checkpoints do not contain

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                with _loading_references(trainer_class):
                    super().__init__(*args, **kwargs)
            except (ValueError, NotImplementedError, ImportError) as error:
                if isinstance(error, UserError):
                    raise
                raise ConfigError(f"TRL refuses these settings: {error}") from error
            for callback in list(self.callback_handler.callbacks):
                if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                    self.remove_callback(type(callback))  # `log` prints in their place
            self.phases, self.stopwatch = PhaseClock(self.args.device), Stopwatch()

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            values = our_names(logs)
            if not values:
                return
            if "train/loss" in values:
                values["train/batch_time"] = self.stopwatch.pop()[1]
                values |= {f"train/{name}_time": seconds for name, seconds in self.phases.pop().items()}
            energy = {} if self.records is None else self.records.rank_times.exchange_energy()
            self.metric_loggers.log({**values, "epoch": self.state.epoch, **energy}, self.state.global_step)
            shown = [f"{key} {value:.4g}" for key, value in values.items() if key.partition("/")[2] in _SHOWN]
            logging.info(f"step {self.state.global_step} of {self.state.max_steps}: {', '.join(shown)}")

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            stop = torch.tensor(float(self.stop_requested), device=self.args.device)
            is_round_end = (self.state.global_step + 1) % self.round_steps == 0
            if sum_over_ranks(stop) and is_round_end:  # all ranks stop at the same step
                self.control.should_save = self.control.should_training_stop = True
            self.phases.enter("inputs")
            loss = super().training_step(*args, **kwargs)
            self.phases.enter("optimizer")
            return loss

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            """Called after each step, and again at the end of a pass."""
            if self.state.global_step != self.timed_step:
                self.timed_step = self.state.global_step
                self.phases.end_step()
                self.stopwatch.record_step(0.0)
            super()._maybe_log_save_evaluate(*args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            with self.stopwatch.paused():
                return super().evaluate(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.model.training:
                self.phases.enter("forward")
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            inner = self.accelerator.unwrap_model(model)
            balancing = balancing_loss(inner.get_base_model() if hasattr(inner, "get_base_model") else inner)
            if not self.model.training:
                return loss
            self.phases.enter("backward")
            return loss if balancing is None else loss + balancing

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            with self.stopwatch.paused():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                folder = storage.join(run.trl, f"checkpoint-{self.state.global_step}")
                write_json(storage.join(folder, COMPLETE), {"tokens": self._total_train_tokens})
            if self.records is not None:
                self.records.update()

        def progress(self) -> dict[str, Any]:
            """Return what this start has computed; transformers estimates the FLOPs."""
            tokens, flops = self._total_train_tokens - self.earlier[0], self.state.total_flos - self.earlier[1]
            return {"step": self.state.global_step, "tokens": tokens, "flops": flops}

    RunTrainer.__name__ = trainer_class.__name__
    return RunTrainer


@contextlib.contextmanager
def _loading_references(trainer_class: type) -> Iterator[None]:
    """Let a trainer of TRL load its reference model with `load_policy`, which knows model_type openlm."""
    module = sys.modules[trainer_class.__module__]
    original = module.create_model_from_path

    def load(folder: str, **options: Any) -> Any:
        return load_policy(folder, **{key: options[key] for key in ("dtype", "attn_implementation") if key in options})

    module.create_model_from_path = load  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.create_model_from_path = original  # type: ignore[attr-defined]
