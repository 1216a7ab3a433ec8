"""The run of a trainer of TRL: model in, run folder, resuming, metrics, model out.

{logs}/{name}/out.log params.txt metrics.jsonl base/ data/ trl/ adapter/ hf/ checkpoints/: `base` has the model to
start from in the format of transformers, `trl` the checkpoints for --resume, `hf` the result in the format of
transformers and `checkpoints` the same as native weights (epoch_0.pt, model.json), which --pretrained and generate.py
accept. `adapter` has the adapters of --lora in the format of PEFT; they are merged in the other two.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from open_lm import storage
from open_lm.checkpoint.folders import is_transformers_folder
from open_lm.config.sections import LoggingConfig
from open_lm.distributed.processes import Runtime, run_on_master
from open_lm.errors import STOP_SIGNALS, ConfigError, UserError, join_problems, missing_package
from open_lm.finetune.chat_templates import ChatTemplate
from open_lm.finetune.tuning_trainer import COMPLETE, our_names
from open_lm.hf.exporting import export_model
from open_lm.hf.folders import CONFIG, find_source, read_json
from open_lm.hf.importing import import_model
from open_lm.hf.peft_adapters import native_sha256, record_base
from open_lm.hf.policy import load_policy, load_policy_tokenizer, quiet, save_policy
from open_lm.monitor.exhausted_memory import OutOfMemory, is_out_of_memory
from open_lm.monitor.loggers import MetricLoggers, build_loggers, setup_logging
from open_lm.monitor.run_folder import RunPaths, write_params
from open_lm.report.run_records import RunRecords

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def require_trl() -> None:
    """Raise ConfigError if a package of the extra `finetune` is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns of kernels that are not used here
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    for module in ("trl", "peft"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            advice = missing_package(module) or str(error)
            raise ConfigError(f"{advice} (TRL requires Python 3.11 or later)") from error


class TuningRun:
    """The folder of a run and the model that it starts from.

    Attributes:
        paths: the paths of the run.
        base: folder with the model to start from, in the format of transformers.
    """

    def __init__(self, args: Namespace, command: str) -> None:
        self.args = args
        name = args.name or f"{command}-{os.path.basename(args.pretrained.rstrip('/'))}"
        self.paths = RunPaths(args.logs, name.replace("/", "-"))
        if not self.paths.enabled:
            raise ConfigError("--logs none: the result of this command is a folder; set --logs to a local folder")
        self.base = storage.join(self.paths.root, "base")
        self.trl = storage.join(self.paths.root, "trl")
        self.data = storage.join(self.paths.root, "data")
        self.result = storage.join(self.paths.root, "hf")

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Create and lock the run's folder, start its log and write the base model. Collective."""
        state = _process_state()
        with contextlib.ExitStack() as stack:
            run_on_master(lambda: stack.enter_context(self.paths.claim(self.args.resume)) and None)
            if self._is_master():
                setup_logging(self.paths.log)
                write_params(self.paths.params, {**vars(self.args), "name": self.paths.name})
            run_on_master(self._write_base)
            with quiet():
                yield
        state.destroy_process_group()

    def _is_master(self) -> bool:
        return bool(_process_state().is_main_process)

    def _write_base(self) -> None:
        if storage.info(storage.join(self.base, CONFIG)) is not None:
            return
        source, args = self.args.pretrained, self.args
        is_native = not is_transformers_folder(source) and (storage.exists(source) or storage.is_remote(source))
        if is_native:
            export_model(source, self.base, None, args.model, args.tokenizer)
        else:
            if args.model or args.tokenizer:
                raise ConfigError(
                    f"--pretrained {source}: has its own model and tokenizer; remove --model, --tokenizer"
                )
            _copy_folder(find_source(source), self.base)

    # ------------------------------------------------------------------------------------------ model and tokenizer
    def load_model(self, tokenizer: Any) -> Any:
        """Return the model to start from, with float32 weights; it generates up to the end of a turn."""
        model = load_policy(self.base)
        stop_ids = model.generation_config.eos_token_id
        stop_ids = stop_ids if isinstance(stop_ids, list) else [] if stop_ids is None else [stop_ids]
        model.generation_config.eos_token_id = list(dict.fromkeys([*stop_ids, *_turn_end_ids(tokenizer)]))
        return model

    def load_tokenizer(self, has_messages: bool) -> Any:
        """Return the tokenizer of the base model. Raise ConfigError if messages need a chat template that it lacks."""
        tokenizer = load_policy_tokenizer(self.base)
        if has_messages and not tokenizer.chat_template:
            raise ConfigError(
                f"--train-data has messages, but the tokenizer of --pretrained {self.args.pretrained} has no chat "
                "template; start from a model that was fine-tuned with one, or write the data as text"
            )
        return tokenizer

    def max_tokens(self) -> int:
        """Return the longest sequence of the model in tokens."""
        config = read_json(storage.join(self.base, CONFIG))
        names = ("seq_len", "max_position_embeddings", "n_positions", "n_ctx")
        return next(int(config[name]) for name in names if config.get(name))

    # ------------------------------------------------------------------------------------------ checkpoints
    def newest_checkpoint(self) -> str | None:
        """Return the newest complete checkpoint for --resume. Log the ones that a killed process left incomplete."""
        if not os.path.isdir(self.trl):
            return None
        steps = sorted((int(m[1]) for m in map(_CHECKPOINT.fullmatch, os.listdir(self.trl)) if m), reverse=True)
        for step in steps:
            folder = storage.join(self.trl, f"checkpoint-{step}")
            if os.path.exists(storage.join(folder, COMPLETE)):
                logging.info(f"--resume latest: {folder}")
                return folder
            logging.warning(f"{folder}: incomplete, skipping it")
        logging.info(f"--resume latest: no complete checkpoint in {self.trl}, starting from scratch")
        return None

    def is_finished(self) -> bool:
        """Return whether the result is complete."""
        return os.path.exists(storage.join(self.paths.checkpoints, "model.json"))

    def save_result(self, model: Any) -> None:
        """Write the trained model to hf/ and checkpoints/, and its adapters to adapter/."""
        from peft import PeftModel

        if isinstance(model, PeftModel):
            adapter = storage.join(self.paths.root, "adapter")
            model.save_pretrained(adapter)
            record_base(adapter, native_sha256(self.base))
            model = model.merge_and_unload()
        shutil.rmtree(self.result, ignore_errors=True)  # of an earlier attempt to write the result
        save_policy(model, self.base, self.result)
        import_model(self.result, self.paths.checkpoints)
        logging.info(f"saved {self.result} and {self.paths.checkpoints}")

    def records(self, start_step: int) -> RunRecords:
        """Start environment.json and the report. Collective."""
        return RunRecords(self.paths, _runtime(), self.args, step=start_step)

    def loggers(self, start_step: int) -> MetricLoggers:
        """Return the loggers to metrics.jsonl and those of --report-to; none on other ranks."""
        section = LoggingConfig.from_object(self.args)
        return build_loggers(section, self.paths, vars(self.args), start_step, self._is_master())


def _process_state() -> Any:
    """Return the ranks of the run; the first call joins the process group, if several processes were started."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _runtime() -> Runtime:
    """Return this rank and its device."""
    state = _process_state()
    size = state.num_processes
    return Runtime(
        state.process_index,
        state.local_process_index,
        size,
        int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        state.device,
    )


def _turn_end_ids(tokenizer: Any) -> list[int]:
    """Return the id of the token that ends a turn of the assistant, if the chat template has one."""
    if not isinstance(tokenizer.chat_template, str):
        return []
    template = ChatTemplate("", tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or "")
    try:
        token = template.turn_end.strip()
    except (ConfigError, IndexError):  # the template does not mark turns or refuses the probe
        return []
    return [tokenizer.get_vocab()[token]] if token in tokenizer.get_vocab() else []


def _copy_folder(source: str, target: str) -> None:
    from open_lm.hf.output_folder import whole_folder

    with whole_folder(target, CONFIG, {"copy": source}) as output:
        names = sorted((info.url.rpartition("/")[2] for info in storage.list_infos(source)), key=CONFIG.__eq__)
        for name in names:  # config.json last: it marks a complete folder
            storage.copy(storage.join(source, name), storage.join(output, name))


# ---------------------------------------------------------------------------------------------- training
@contextlib.contextmanager
def stopping_on_signals(trainer: Any) -> Iterator[None]:
    """Save and stop after the current step if a stop signal arrives; a second Ctrl-C ends the process at once."""

    def receive(number: int, frame: Any) -> None:
        if trainer.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        logging.warning(f"received {signal.Signals(number).name}: saving and stopping after this step")

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def explained_out_of_memory(args: Namespace) -> Iterator[None]:
    """Raise OutOfMemory, which names settings that need less, in place of an error of an allocator in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        state = _process_state()
        rows = args.batch_size or max(args.global_batch_size // state.num_processes, 1)
        advice = [
            *([f"--batch-size {rows // 2} instead of {rows}: fewer rows at once, the same update"] if rows > 1 else []),
            *(["--grad-checkpointing: compute activations again in the backward pass"] * (not args.grad_checkpointing)),
            *(["--lora r=16: train adapters only"] * (args.lora is None)),
            f"{'--max-completion-tokens' if hasattr(args, 'max_completion_tokens') else '--max-length'}: shorter rows",
        ]
        reason = str(error).partition("\n")[0] or type(error).__name__
        heading = f"the memory of rank {state.process_index} is exhausted ({reason}); settings that need less"
        raise OutOfMemory(join_problems(advice, heading)) from error


def train(run: TuningRun, build: Callable[[], Any]) -> dict[str, float]:
    """Train with the trainer that `build` returns, and save the result. Return the last evaluation's metrics.

    Evaluates before the first step and after the last one if there is evaluation data.
    """
    checkpoint = run_on_master(run.newest_checkpoint) if run.args.resume else None
    if run.args.resume and run_on_master(run.is_finished):
        logging.info(f"{run.paths.root}: the run is finished already")
        return {}
    trainer = build()
    start_step = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    trainer.metric_loggers = run.loggers(start_step)
    trainer.records = records = run.records(start_step)
    records.progress = trainer.progress
    if checkpoint:
        trainer._total_train_tokens = read_json(storage.join(checkpoint, COMPLETE))["tokens"]
        state = read_json(storage.join(checkpoint, "trainer_state.json"))
        trainer.earlier = trainer._total_train_tokens, state["total_flos"]
    metrics: dict[str, float] = {}
    try:
        # Not trainer.evaluate(): it would leave the model unwrapped, and ranks would not average their gradients.
        trainer.args.eval_on_start = trainer.eval_dataset is not None and checkpoint is None
        with stopping_on_signals(trainer), explained_out_of_memory(run.args):
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            logging.info(f"stopped at step {trainer.state.global_step}; continue with --resume latest")
            return {}
        if trainer.eval_dataset is not None:
            metrics = trainer.evaluate()
        run_on_master(lambda: run.save_result(trainer.accelerator.unwrap_model(trainer.model)))
    finally:
        records.finish()
        trainer.metric_loggers.close()
    return our_names(metrics)
