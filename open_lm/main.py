"""`python -m open_lm.main`: configuration -> runtime -> session (data, model, weights) -> training or evaluation.

Flags are parsed before torch is imported, so that --help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import logging.handlers
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from open_lm.config.architecture import architecture_of
from open_lm.config.checks import wants_training
from open_lm.config.command_line import parse_args
from open_lm.config.ineffective import ineffective_flags
from open_lm.config.layout import MeshLayout, resolve_layout
from open_lm.config.sections import (
    Config,
    DataConfig,
    FaultConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
)
from open_lm.errors import ConfigError, end_process, join_problems, run_cli
from open_lm.monitor.run_folder import RunPaths, copy_codebase, write_params
from open_lm.storage import write_text
from open_lm.storage.redaction import redacted

if TYPE_CHECKING:
    from torch import nn

    from open_lm.distributed.processes import Runtime
    from open_lm.monitor.loggers import MetricLoggers
    from open_lm.training.build import Session

EVALUATION_BATCH_SIZE = 8  # sequences on a device, where neither flags nor a training say how many


def main(argv: Sequence[str]) -> argparse.Namespace:
    """Do what the flags say, training or evaluation, in this process (one of several under torchrun).

    Returns the settings once everything is done, the last remote copy too. Raises UserError for what the user can
    mend; SystemExit for --help alone.
    """
    args = parse_args(argv, for_run=True)
    # A mistyped name or file is told before torch is imported.
    architecture = architecture_of(args.model) if args.hf_model is None else {}
    from open_lm.distributed.processes import init_runtime, shutdown
    from open_lm.monitor.loggers import close_logging

    runtime = init_runtime(ParallelConfig.from_object(args))
    try:
        with ExitStack() as stack:
            _run(args, architecture, runtime, stack)
    finally:
        close_logging()
        shutdown(runtime)
    return args


def load_model(args: Any, model: nn.Module, different_seed: bool = False) -> tuple[int, int | None, int | None]:
    """Load `args.resume` into `model`: (epoch, step, seed), see open_lm.checkpoint.load_model."""
    from open_lm.checkpoint import load_model as load

    return load(args, model, different_seed)


def _run(args: argparse.Namespace, architecture: dict[str, Any], runtime: Runtime, stack: ExitStack) -> None:
    from open_lm.checkpoint import candidates
    from open_lm.distributed.processes import agree_on_name, broadcast_object, run_on_master, restart_count
    from open_lm.monitor.watchdog import Watchdog
    from open_lm.training.build import build_session, build_trainer, load_state
    from open_lm.training.control import RunControl
    from open_lm.training.run import TrainingRun

    layout = resolve_layout(ParallelConfig.from_object(args), runtime.world_size, runtime.local_world_size)
    resolve_batch_sizes(args, layout.data_size)
    named = args.name is not None
    args.name = broadcast_object(runtime, args.name) if named else agree_on_name(runtime, lambda: default_name(args))
    if restart_count() and args.resume is None and wants_training(DataConfig.from_object(args)):
        args.resume = "latest"  # a launcher that starts the ranks anew means the same run
    config = Config.from_namespace(args)
    trains = wants_training(config.data)
    control = RunControl(runtime.is_master, config.checkpoint.save_every_minutes)
    if trains:  # an evaluation has nothing to save: a signal ends it
        stack.enter_context(control)
    begin_log_file = _start_logging(args, config, runtime, stack)
    _check_and_tell(config, architecture, runtime, layout)
    paths = RunPaths(config.logging.logs, args.name, config.checkpoint.checkpoint_dir)
    run_on_master(lambda: paths.prepare(config.checkpoint.resume))
    run_on_master(lambda: stack.enter_context(paths.lock()))
    found = candidates(config.checkpoint, config.logging, paths)
    if config.checkpoint.resume == "latest" and not found:
        run_on_master(paths.check_checkpoint_dir)
    session = build_session(config, runtime, paths)
    trainer = build_trainer(session, control) if trains else None
    load_state(session, trainer, found)
    args.resume = session.resume
    loggers, described = _open_run(args, architecture, session, stack)
    if runtime.is_master:
        _tell_changed_flags(session.saved_flags, described)
    begin_log_file(paths)
    # Entered last and so left first: a rank that fails says so before it waits for anything.
    stack.enter_context(Watchdog(config.faults.hang_timeout, runtime, paths.stacks if paths.enabled else None))
    if trainer is None:
        _evaluate_only(session, loggers)
        return
    trainer.report = loggers.log
    TrainingRun(session, trainer, loggers, described).run()


# ------------------------------------------------------------------------------------------------ before the run
def resolve_batch_sizes(args: argparse.Namespace, world_size: int) -> None:
    """Set the global batch sizes that are left open, and those of a device; ConfigError where they do not divide.

    world_size: ranks that rows are divided over; those of --context-parallel and --tensor-parallel share theirs.
    """
    micro_batches = world_size * args.accum_freq
    if args.batch_size is not None:
        args.global_batch_size = args.batch_size * micro_batches
    if args.global_val_batch_size is None:
        args.global_val_batch_size = max(args.global_batch_size // args.accum_freq, 1)
        if not wants_training(DataConfig.from_object(args)):  # no training has shown that more fits
            args.global_val_batch_size = min(args.global_val_batch_size, EVALUATION_BATCH_SIZE * world_size)
    problems = []
    if args.global_batch_size % micro_batches:
        problems.append(
            f"--global-batch-size {args.global_batch_size} does not divide into {world_size} ranks x --accum-freq "
            f"{args.accum_freq}: give a multiple of {micro_batches}"
        )
    elif args.val_data and args.global_val_batch_size % world_size:
        problems.append(
            f"--global-val-batch-size {args.global_val_batch_size} does not divide into {world_size} ranks: give a "
            f"multiple of {world_size}"
        )
    if problems:
        raise ConfigError(join_problems(problems))
    args.per_gpu_batch_size = args.global_batch_size // world_size
    args.per_gpu_val_batch_size = args.global_val_batch_size // world_size


def default_name(args: argparse.Namespace) -> str:
    """The name of a run that got none: date, model, learning rate and batch size of a device."""
    model = args.hf_model or (PurePath(args.model).stem if args.model.endswith(".json") else args.model)
    date = datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    return f"{date}-model_{model.strip('/').replace('/', '-')}-lr_{args.lr}-b_{args.per_gpu_batch_size}"


def _start_logging(
    args: argparse.Namespace, config: Config, runtime: Runtime, stack: ExitStack
) -> Callable[[RunPaths], None]:
    """Log to the console. The returned function begins out.log, with what was said before: a run that fails while it
    is being set up leaves no log, so that it can be started again under its name. What ends it later is the last line.
    """
    from open_lm.monitor.loggers import setup_logging, write_to_log_file

    level = logging.DEBUG if config.run.debug else logging.INFO
    console_level = level if runtime.is_master else logging.WARNING
    setup_logging(None, level, console_level)
    said_before = logging.handlers.MemoryHandler(capacity=10**9, flushLevel=logging.CRITICAL + 1)
    logging.getLogger().addHandler(said_before)
    stack.callback(logging.getLogger().removeHandler, said_before)
    args.log_level = level

    def begin_log_file(paths: RunPaths) -> None:
        logging.getLogger().removeHandler(said_before)
        setup_logging(_log_file(config, runtime, paths), level, console_level)
        write_to_log_file(said_before.buffer)
        stack.push(note_the_end)

    def note_the_end(kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            said = f"the run ended early: {type(error).__name__}: {error}"
            record = {"name": "root", "levelno": logging.ERROR, "levelname": "ERROR", "msg": said}
            write_to_log_file([logging.makeLogRecord(record)])

    return begin_log_file


def _log_file(config: Config, runtime: Runtime, paths: RunPaths) -> str | None:
    """out.log on rank 0; with --log-local also out-RANK on the first rank of every other node."""
    if not paths.enabled or not (runtime.is_master or (config.logging.log_local and runtime.local_rank == 0)):
        return None
    return paths.log if runtime.is_master else os.path.join(paths.root, f"out-{runtime.rank}")


def _check_and_tell(config: Config, architecture: dict[str, Any], runtime: Runtime, layout: MeshLayout) -> None:
    """Say what the run starts on and which flags change nothing; ConfigError for what this device cannot do."""
    from open_lm.parallel.parallelize import notes

    is_sharded = config.parallel.fsdp or layout.tensor > 1
    if is_sharded and config.precision.precision == "amp" and runtime.device.type == "cuda":
        flag = "--fsdp" if config.parallel.fsdp else "--tensor-parallel"
        raise ConfigError(
            f"--precision amp computes in float16 on CUDA, whose loss scaling does not work with {flag}: give "
            "--precision amp_bfloat16"
        )
    if runtime.world_size > 1:
        logging.info(
            f"Running in distributed mode with multiple processes. Device: {runtime.device}. "
            f"Process (global: {runtime.rank}, local {runtime.local_rank}), total {runtime.world_size}."
        )
    else:
        logging.info(f"Running with a single process. Device {runtime.device}.")
    if runtime.is_master:
        if config.precision.precision == "fp16":
            logging.warning("--precision fp16 trains in float16 without loss scaling; amp or amp_bfloat16 is safer")
        for note in [*ineffective_flags(config, architecture), *notes(config.parallel, runtime.device)]:
            logging.warning(note)


def _tell_changed_flags(before: dict[str, Any], now: dict[str, Any]) -> None:
    """What a run goes on with that it did not begin with, of what may change its numbers."""
    sections = (DataConfig, ModelConfig, OptimConfig, PrecisionConfig, FaultConfig)
    changed = [
        f"{spec.flag} was {before[spec.name]}, now it is {now[spec.name]}"
        for section in sections
        for spec in section.specs()
        if spec.name in before and spec.name not in _CHANGES_NOTHING and before[spec.name] != now[spec.name]
    ]
    if changed:
        logging.warning(join_problems(changed, "the run goes on with other settings than its checkpoint's"))


# Of the sections above: where data lie, how fast they come, and what the checks of resuming compare themselves.
_CHANGES_NOTHING = frozenset({
    "train_data", "dataset_manifest", "workers", "cache_dir", "cache_limit", "read_timeout", "allow_changed_data",
    "batch_size", "accum_freq", "hang_timeout",
})  # fmt: skip


def _open_run(
    args: argparse.Namespace, architecture: dict[str, Any], session: Session, stack: ExitStack
) -> tuple[MetricLoggers, dict[str, Any]]:
    """Write down what the run is, begin its copies, and open its loggers, which `stack` closes; returns them and the
    run's settings as they were written, without secrets."""
    from open_lm.data import provenance
    from open_lm.distributed.processes import run_on_master
    from open_lm.monitor.loggers import build_loggers
    from open_lm.parallel.parallelize import unwrap
    from open_lm.storage.remote_sync import RemoteSync, remote_folder

    config, runtime, paths = session.config, session.runtime, session.paths
    params = _describe(args, session)
    model = unwrap(session.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if runtime.is_master:
        logging.info(f"Model (has {trained} parameters):")
        logging.info(str(model))
        logging.info("Params:")
        for key, value in sorted(params.items()):
            logging.info(f"  {key}: {value}")
    cfg = config.logging

    def write() -> None:
        write_params(paths.params, params)
        if architecture:
            write_text(paths.model, json.dumps(architecture, indent=2) + "\n")
        if session.train_loader is not None:
            provenance.write(paths.data, provenance.describe(session.train_loader.sources))
        if cfg.copy_codebase:
            logging.info(f"copied the program's source to {copy_codebase(paths)}")

    if paths.enabled:
        run_on_master(write)
    remote = remote_folder(cfg, paths.name)
    if remote is not None:
        for folder in paths.local_roots():
            sync = RemoteSync(folder, remote, cfg.remote_sync_frequency)
            run_on_master(sync.start)
            if runtime.is_master:
                stack.push(sync)
    step = session.progress.step or 0
    loggers = build_loggers(cfg, paths, params, step, runtime.is_master)
    stack.callback(loggers.close)
    return loggers, redacted(params)


def _describe(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """The settings with what the run added to them, as params.txt holds them: there train_num_samples and
    val_num_samples count sequences. Sets the additions on `args` as well."""
    from open_lm.monitor.loggers import parse_report_to

    runtime, paths, params = session.runtime, session.paths, session.params
    reporters = parse_report_to(args.report_to)
    args.device, args.distributed = str(runtime.device), runtime.distributed
    args.rank, args.local_rank, args.world_size = runtime.rank, runtime.local_rank, runtime.world_size
    args.seq_len, args.vocab_size = params.seq_len, params.vocab_size
    args.checkpoint_path, args.failed_checkpoint_path = paths.checkpoints, paths.failed
    args.log_path = _log_file(session.config, runtime, paths)
    args.wandb, args.tensorboard = "wandb" in reporters, "tensorboard" in reporters
    args.tensorboard_path = paths.tensorboard if args.tensorboard else ""
    described = dict(vars(args))
    for name in ("train_num_samples", "val_num_samples"):
        if described[name] is not None:
            described[name] //= params.seq_len
    return described


# ------------------------------------------------------------------------------------------------ evaluation
def _evaluate_only(session: Session, loggers: MetricLoggers) -> None:
    """Validate the loaded weights, or with --averagers the first of its averages."""
    from open_lm.training.build import evaluation_options, validate

    logging.info("No training required, evaluating instead.")
    options, step = evaluation_options(session, session.progress.samples_seen), session.progress.step or 0
    if session.averagers is None:
        validate(session, loggers, options, step)
        return
    name, averager = next(iter(session.averagers.avgs_dict.items()))
    logging.info(f"=> evaluation avg {name}")
    with averager.applied():
        validate(session, loggers, options, step, average=name)


if __name__ == "__main__":
    end_process(run_cli(main))
