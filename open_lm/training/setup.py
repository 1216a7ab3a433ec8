"""Prepare a run before its first step: batch sizes, name, log file, run folder, loggers."""

from __future__ import annotations

import argparse
import json
import logging
import logging.handlers
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import PurePath
from typing import Any

from open_lm import storage
from open_lm.config.adapters import AdapterConfig
from open_lm.config.checks import only_evaluates, wants_training
from open_lm.config.distill_section import DistillConfig
from open_lm.config.doubts import doubtful_settings
from open_lm.config.layout import MeshLayout, resolve_layout
from open_lm.config.no_effect import flags_without_effect
from open_lm.config.sections import (
    Config,
    DataConfig,
    FaultConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
)
from open_lm.data import provenance
from open_lm.data.epochs import pass_tokens
from open_lm.data.order import Source
from open_lm.data.sources import find_sources
from open_lm.data.tokenizers import record_in_run
from open_lm.distributed.processes import Runtime, agree_on_name, broadcast_object, restart_count, run_on_master
from open_lm.errors import ConfigError, join_problems
from open_lm.model.parametrization import parametrization_of
from open_lm.monitor.loggers import (
    MetricLoggers,
    build_loggers,
    log_to_file,
    parse_report_to,
    setup_logging,
    write_to_log_file,
)
from open_lm.monitor.run_folder import RunPaths, copy_codebase, write_params
from open_lm.parallel.parallelize import ineffective_settings, unwrap
from open_lm.report.run_records import RunRecords
from open_lm.storage import write_text
from open_lm.storage.redaction import redacted
from open_lm.storage.remote_sync import RemoteSync, remote_folder
from open_lm.system.names import printable, setting_text
from open_lm.training.build import RunParts
from open_lm.training.summary import summarize_settings

EVALUATION_BATCH_SIZE = 8  # sequences per device of an evaluation without --global-val-batch-size


# ------------------------------------------------------------------------------------------------ settings
def resolve_settings(args: argparse.Namespace, runtime: Runtime) -> tuple[Config, MeshLayout]:
    """Set in `args` what depends on the ranks: batch sizes, name, resume after a restart. Collective.

    Returns the configuration and the layout of the ranks.
    """
    layout = resolve_layout(ParallelConfig.from_object(args), runtime.world_size, runtime.local_world_size)
    resolve_batch_sizes(args, layout.data_size)
    if args.name is not None:
        args.name = broadcast_object(runtime, args.name)
    else:
        args.name = agree_on_name(runtime, lambda: default_name(args))
    if restart_count() and wants_training(DataConfig.from_object(args)):
        args.resume = "latest"  # a launcher that restarts the ranks continues the same run
    return Config.from_namespace(args), layout


def resolve_epoch_length(args: argparse.Namespace, architecture: Mapping[str, Any]) -> None:
    """Set --train-num-samples of a run with --recipe to one pass over the data, if it is not given.

    That of raw text is known when its index is made (`raw_text.prepare_text`).

    ConfigError: the number of sequences is not known.
    """
    data = DataConfig.from_object(args)
    if not wants_training(data) or data.train_num_samples is not None or data.train_text:
        return
    seq_len = args.hf_seq_len if args.hf_model else architecture["seq_len"]
    if isinstance(seq_len, int):  # the model reports its absence
        args.train_num_samples = pass_tokens(find_sources(data), seq_len)


def resolve_batch_sizes(args: argparse.Namespace, world_size: int) -> None:
    """Set the global batch sizes that are not given and the batch sizes per device.

    world_size: data-parallel ranks; ranks of --context-parallel and --tensor-parallel share sequences.

    Raises:
        ConfigError: a global batch size that the run uses is not divisible by the number of ranks.
    """
    micro_batches, evaluates = world_size * args.accum_freq, only_evaluates(Config.from_namespace(args))
    if args.batch_size is not None:
        args.global_batch_size = args.batch_size * micro_batches
    if args.global_val_batch_size is None:
        args.global_val_batch_size = max(args.global_batch_size // args.accum_freq, 1)
        if evaluates:  # unlike in training, nothing shows that more fits
            per_rank = min(max(args.global_val_batch_size // world_size, 1), EVALUATION_BATCH_SIZE)
            args.global_val_batch_size = per_rank * world_size
    problems = []
    if args.global_batch_size % micro_batches and not evaluates:
        problems.append(
            f"--global-batch-size {args.global_batch_size} is not divisible by {world_size} ranks x --accum-freq "
            f"{args.accum_freq}: give a multiple of {micro_batches}"
        )
    elif args.val_data and args.global_val_batch_size % world_size:
        problems.append(
            f"--global-val-batch-size {args.global_val_batch_size} is not divisible by {world_size} ranks: give a "
            f"multiple of {world_size}"
        )
    if problems:
        raise ConfigError(join_problems(problems))
    args.per_gpu_batch_size = args.global_batch_size // world_size
    args.per_gpu_val_batch_size = args.global_val_batch_size // world_size


def default_name(args: argparse.Namespace) -> str:
    """Return the name of a run without --name: date, model, learning rate and batch size per device."""
    model = args.hf_model or (PurePath(args.model).stem if args.model.endswith(".json") else args.model)
    date = datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    return f"{date}-model_{model.strip('/').replace('/', '-')}-lr_{args.lr}-b_{args.per_gpu_batch_size}"


# ------------------------------------------------------------------------------------------------ log
def start_logging(
    args: argparse.Namespace, config: Config, runtime: Runtime, stack: ExitStack
) -> Callable[[RunPaths], None]:
    """Log to the console; the returned function starts out.log, beginning with the messages logged until then.

    A run that fails during its setup leaves no log, so it can be started again under the same name. Once out.log is
    started, an error that ends the run becomes its last line.
    """
    level = logging.DEBUG if config.run.debug else logging.INFO
    console_level = level if runtime.is_master else logging.WARNING
    setup_logging(None, level, console_level)
    buffered = logging.handlers.MemoryHandler(capacity=10**9, flushLevel=logging.CRITICAL + 1)
    logging.getLogger().addHandler(buffered)
    stack.callback(logging.getLogger().removeHandler, buffered)
    args.log_level = level

    def start_log_file(paths: RunPaths) -> None:
        logging.getLogger().removeHandler(buffered)
        setup_logging(log_file(config, runtime, paths), level, console_level)
        write_to_log_file(buffered.buffer)
        stack.push(log_error)

    def log_error(kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            message = f"the run ended early: {type(error).__name__}: {error}"
            record = {"name": "root", "levelno": logging.ERROR, "levelname": "ERROR", "msg": message}
            write_to_log_file([logging.makeLogRecord(record)])

    return start_log_file


def log_file(config: Config, runtime: Runtime, paths: RunPaths) -> str | None:
    """Return out.log on rank 0 and, with --log-local, out-RANK on the first rank of every other node."""
    if not paths.enabled or not (runtime.is_master or (config.logging.log_local and runtime.local_rank == 0)):
        return None
    return paths.log if runtime.is_master else os.path.join(paths.root, f"out-{runtime.rank}")


def check_device(config: Config, architecture: dict[str, Any], runtime: Runtime, layout: MeshLayout) -> None:
    """Log the device, the flags without effect and doubtful settings.

    Raises:
        ConfigError: the device does not support the settings.
    """
    is_sharded = config.parallel.fsdp or layout.tensor > 1
    scales_loss = config.precision.precision == "amp" and runtime.device.type == "cuda" and not only_evaluates(config)
    if is_sharded and scales_loss:
        flag = "--fsdp" if config.parallel.fsdp else "--tensor-parallel"
        raise ConfigError(
            f"--precision amp computes in float16 on CUDA, and its loss scaling does not work with {flag}: give "
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
        for note in [
            *flags_without_effect(config, architecture),
            *doubtful_settings(config, architecture),
            *ineffective_settings(config.parallel, runtime.device),
            *(
                ["--memory-snapshot has no effect on CPU: torch records the allocations of CUDA memory only"]
                if config.diagnostics.memory_snapshot and runtime.device.type != "cuda"
                else []
            ),
        ]:
            logging.warning(note)


def warn_changed_flags(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Warn of flags that differ from those of the resumed checkpoint and may change the numbers.

    Values are compared as text: interchange checkpoints have those of params.txt.
    """
    sections = (DataConfig, ModelConfig, AdapterConfig, OptimConfig, PrecisionConfig, DistillConfig, FaultConfig)
    changed = [
        f"{spec.flag} was {saved[spec.name]}, now it is {current[spec.name]}"
        for section in sections
        for spec in section.specs()
        if spec.name in saved
        and spec.name not in _HARMLESS_FLAGS
        and printable(setting_text(saved[spec.name])) != printable(setting_text(current[spec.name]))
    ]
    if changed:
        logging.warning(join_problems(changed, "the run continues with other settings than its checkpoint's"))


# Flags of these sections that do not change the numbers, or that the checks of resuming compare themselves.
_HARMLESS_FLAGS = frozenset({
    "train_data", "dataset_manifest", "train_text", "text_index", "workers", "cache_dir", "cache_limit", "read_timeout",
    "allow_changed_data",
    "allow_other_tokenizer", "batch_size", "accum_freq", "hang_timeout",
})  # fmt: skip


# ------------------------------------------------------------------------------------------------ run folder
def open_run(
    args: argparse.Namespace, architecture: dict[str, Any], parts: RunParts, stack: ExitStack
) -> tuple[MetricLoggers, dict[str, Any]]:
    """Write the run's settings, start the remote copy, and open the loggers, which `stack` closes.

    Returns the loggers and the settings as written, without secrets.
    """
    config, runtime, paths = parts.config, parts.runtime, parts.paths
    params = _describe(args, parts)
    if runtime.is_master:
        _log_model_and_params(parts, params)

    def write() -> None:
        write_params(paths.params, params)
        if architecture:
            write_text(paths.model, json.dumps(architecture, indent=2, allow_nan=False) + "\n")
        if parts.train_loader is not None:
            _record_data(parts, parts.train_loader.sources)
        if config.logging.copy_codebase:
            logging.info(f"copied the program's source to {copy_codebase(paths)}")

    if paths.enabled:
        run_on_master(write)
    _start_remote_sync(config, runtime, paths, stack)
    start_step = -1 if parts.resume is None else parts.progress.step or 0  # without a checkpoint, no line is valid
    loggers = build_loggers(config.logging, paths, params, start_step, runtime.is_master)
    stack.callback(loggers.close)
    return loggers, redacted(params)


def open_records(parts: RunParts, stack: ExitStack) -> RunRecords:
    """Start the records of the run, which `stack` finishes: before the last remote copy, if `open_run` came first."""
    loader = parts.train_loader
    data = None if loader is None else provenance.describe(loader.sources)
    records = RunRecords(
        parts.paths,
        parts.runtime,
        parts.config.logging,
        step=parts.progress.step or 0,
        data=data,
    )
    stack.callback(records.finish)
    return records


def _record_data(parts: RunParts, sources: Sequence[Source]) -> None:
    """Write data.json and the tokenizer to the folders of the run, so that each records them for its checkpoints."""
    record_in_run(sources, parts.paths.roots, parts.resume or parts.config.checkpoint.pretrained)
    description = provenance.describe(sources)
    for root in parts.paths.roots:
        provenance.write(storage.join(root, provenance.FILE_NAME), description)


def _log_model_and_params(parts: RunParts, params: dict[str, Any]) -> None:
    """Log the main settings, and all details to out.log only."""
    model = unwrap(parts.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logging.info(
        f"{trained:,} trained parameters, sequences of {parts.params.seq_len} tokens, a vocabulary of "
        f"{parts.params.vocab_size}"
    )
    for message in summarize_settings(parts.config, parts.paths.params if parts.paths.enabled else None):
        logging.info(message)
    if not parametrization_of(model).is_standard:
        logging.info(parametrization_of(model).text(parts.params.dim))
    log_to_file(f"Model (has {trained} parameters):")
    log_to_file(str(model))
    log_to_file("Params:")
    for key, value in sorted(params.items()):
        log_to_file(f"  {key}: {value}")


def _start_remote_sync(config: Config, runtime: Runtime, paths: RunPaths, stack: ExitStack) -> None:
    remote = remote_folder(config.logging, paths.name)
    if remote is None:
        return
    for folder in paths.local_roots():
        sync = RemoteSync(folder, remote, config.logging.remote_sync_frequency)
        run_on_master(sync.start)
        if runtime.is_master:
            stack.push(sync)


def _describe(args: argparse.Namespace, parts: RunParts) -> dict[str, Any]:
    """Return the settings of params.txt: `args` and what the run adds, which is also set on `args`.

    In the result, train_num_samples and val_num_samples count sequences, as in the original OpenLM.
    """
    runtime, paths, params = parts.runtime, parts.paths, parts.params
    reporters = parse_report_to(args.report_to)
    args.device, args.distributed = str(runtime.device), runtime.distributed
    args.rank, args.local_rank, args.world_size = runtime.rank, runtime.local_rank, runtime.world_size
    args.seq_len, args.vocab_size = params.seq_len, params.vocab_size
    args.checkpoint_path, args.failed_checkpoint_path = paths.checkpoints, paths.failed
    args.log_path = log_file(parts.config, runtime, paths)
    args.wandb, args.tensorboard = "wandb" in reporters, "tensorboard" in reporters
    args.tensorboard_path = paths.tensorboard if args.tensorboard else ""
    described = dict(vars(args))
    for name in ("train_num_samples", "val_num_samples"):
        if described[name] is not None:
            described[name] //= params.seq_len
    return described
