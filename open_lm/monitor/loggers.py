"""Where a run's messages and numbers go: console and out.log, and metrics.jsonl, TensorBoard and Weights & Biases
behind one interface. Nothing here imports torch or wandb before it is asked for.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from open_lm import storage
from open_lm.config.registry import LOGGERS
from open_lm.config.sections import LoggingConfig
from open_lm.errors import ConfigError, StorageError
from open_lm.monitor.run_folder import RunPaths
from open_lm.storage.redaction import redact, redacted

_LINE = "%(asctime)s | %(levelname)s | %(message)s"
_TIME = "%Y-%m-%d,%H:%M:%S"
# At INFO these report each request or credential lookup.
_CHATTY = ("botocore", "boto3", "s3transfer", "urllib3", "aiobotocore", "s3fs", "fsspec", "asyncio", "filelock")


# ---------------------------------------------------------------------------------------------- messages
class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _OurHandler:
    """Marks the handlers that `setup_logging` put up, so that the next run in this process replaces them."""


class _Console(logging.StreamHandler, _OurHandler):  # without its type argument, which Python 3.10 refuses
    def handleError(self, record: logging.LogRecord) -> None:
        """Whoever read the console may go; the run and its log file go on."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


class _File(logging.FileHandler, _OurHandler):
    pass


def setup_logging(log_file: str | None = None, level: int = logging.INFO, console_level: int | None = None) -> None:
    """Send the root logger's messages to the console and, where given, to `log_file` (appended to).

    Lines read "2026-01-31,23:59:59 | INFO | message" and hold no secrets. Called again, it replaces what it put up.
    """
    root = logging.getLogger()
    close_logging()
    root.setLevel(level)
    handlers: list[logging.Handler] = [_Console(sys.stdout)]
    handlers[0].setLevel(level if console_level is None else console_level)
    if log_file is not None:
        try:
            storage.makedirs(os.path.dirname(os.path.abspath(log_file)))
            handlers.append(_File(log_file, encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{log_file}: the log cannot be written ({error})") from error
    for handler in handlers:
        handler.setFormatter(_RedactingFormatter(_LINE, _TIME))
        root.addHandler(handler)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def write_to_log_file(records: Iterable[logging.LogRecord]) -> None:
    """Messages for the log file alone: what the console showed before, or shows in another way."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _File):
            for record in records:
                handler.handle(record)


def close_logging() -> None:
    """Take down what `setup_logging` put up."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _OurHandler)]:
        root.removeHandler(handler)
        handler.close()


# ---------------------------------------------------------------------------------------------- numbers
class MetricLogger(Protocol):
    """One place that numbers go to."""

    def log(self, values: Mapping[str, Any], step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class JsonLinesLogger:
    """metrics.jsonl: one JSON object a line with step, time (seconds since the epoch) and the values given.

    A line is appended in a single write. Opened at `start_step`, lines of later steps (of a run that went on after
    the checkpoint which is continued now) and half-written ones are dropped first. NaN and infinities become null.
    """

    def __init__(self, path: str, start_step: int = 0) -> None:
        self._path = path
        self.rewind(start_step)

    def rewind(self, step: int) -> None:
        filter_lines(self._path, lambda line: isinstance(line["step"], int) and line["step"] <= step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {key: _json_value(value) for key, value in values.items()}
        append_line(self._path, json.dumps({"step": step, "time": round(time.time(), 3), **numbers}, allow_nan=False))

    def close(self) -> None:
        """Nothing is held open between two lines."""


def append_line(path: str, line: str) -> None:
    """Append one line to a local file in a single write, so that lines of several writers never mix; to a remote one
    by writing it anew."""
    data = (line.rstrip("\n") + "\n").encode("utf-8")
    if storage.is_remote(path):
        storage.write_bytes(path, (storage.read_bytes(path) if storage.exists(path) else b"") + data)
        return
    try:
        storage.makedirs(os.path.dirname(os.path.abspath(path)))
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            written = os.write(handle, data)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror} (errno {error.errno})") from error
    if written != len(data):
        raise StorageError(f"{path}: only {written} of {len(data)} bytes could be appended; is the disk full?")


def filter_lines(path: str, is_kept: Callable[[Any], bool]) -> None:
    """Drop the lines of a file of JSON lines that are not kept, half-written ones, and those of another shape."""
    if not os.path.exists(path):
        return
    lines = storage.read_bytes(path).decode("utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _fits(line, is_kept)]
    if len(kept) < len(lines):
        storage.write_text(path, "".join(kept))


def _fits(line: str, is_kept: Callable[[Any], bool]) -> bool:
    try:
        return is_kept(json.loads(line))
    except (ValueError, KeyError, IndexError, TypeError):
        return False


def _json_value(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    number = value.item() if hasattr(value, "item") else float(value)
    return None if isinstance(number, float) and not math.isfinite(number) else number


class TensorBoardLogger:
    """Event files in `folder`; continued at `start_step`, later steps of earlier files are hidden."""

    def __init__(self, folder: str, start_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--report-to tensorboard: the package tensorboard is not installed ({error}); "
                "install it with `pip install tensorboard`, or leave it out of --report-to"
            ) from error
        continued = os.path.isdir(folder) and bool(os.listdir(folder))
        self._folder, self._open = folder, SummaryWriter
        self._writer = SummaryWriter(folder, purge_step=start_step + 1 if continued else None)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(self._folder, purge_step=step + 1)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for key, value in _numbers(values).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run, found again by its name when the run is continued.

    Offline with WANDB_MODE=offline, and where no API key is known: the run then lies in {root}/wandb for `wandb sync`.
    """

    def __init__(self, cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"--report-to wandb: the package wandb is not installed ({error}); "
                "install it with `pip install wandb`, or leave it out of --report-to"
            ) from error
        self._wandb, self._alone = wandb, wandb.run is None
        mode = os.environ.get("WANDB_MODE") or ("online" if _knows_wandb_key() else "offline")
        if mode == "offline" and "WANDB_MODE" not in os.environ:
            folder = storage.join(paths.root, "wandb")
            logging.warning(
                f"no Weights & Biases API key was found: the run is kept in {folder}; "
                f"upload it later with `wandb sync {folder}/offline-run-*`"
            )
        try:
            self._run = wandb.init(
                project=cfg.wandb_project_name,
                name=paths.name,
                id=re.sub(r"[^A-Za-z0-9_.\-]", "-", paths.name)[-128:],
                notes=cfg.wandb_notes or None,
                resume="allow",
                dir=paths.root,
                config=redacted(params),
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            advice = "check WANDB_API_KEY and the network, or set WANDB_MODE=offline"
            raise ConfigError(f"--report-to wandb: {redact(str(error))}; {advice}") from error
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log({**_numbers(values), "step": step})

    def rewind(self, step: int) -> None:
        """Nothing can be taken back there: later values of a step stand beside the earlier ones."""

    def close(self) -> None:
        self._run.finish()
        if self._alone:
            self._wandb.teardown()  # waits until wandb's own process has written its files to the end


def _knows_wandb_key() -> bool:
    """Whether a key is set, or `wandb login` left one; asking wandb itself may prompt at a terminal and wait."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in ((key, _json_value(value)) for key, value in values.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class MetricLoggers:
    """All places that a run's numbers go to; itself a MetricLogger. One without any is a silent one."""

    def __init__(self, loggers: list[MetricLogger] | None = None) -> None:
        self._loggers = loggers or []

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record `values` (numbers or 0-dimensional tensors, by names such as "train/loss") at an optimizer step."""
        for logger in self._loggers:
            logger.log(values, step)

    def rewind(self, step: int) -> None:
        """Forget what was recorded of later steps: the run goes on from there."""
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Finish all of them; the first failure is raised after every one was tried."""
        failures = []
        for logger in self._loggers:
            try:
                logger.close()
            except Exception as error:
                failures.append(error)
        self._loggers = []
        if failures:
            raise failures[0]


@LOGGERS.register("tensorboard", help="TensorBoard event files in the run's folder")
def _open_tensorboard(
    cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any], start_step: int
) -> TensorBoardLogger:
    return TensorBoardLogger(paths.tensorboard, start_step)


@LOGGERS.register("wandb", help="Weights & Biases")
def _open_wandb(cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any], start_step: int) -> WandbLogger:
    return WandbLogger(cfg, paths, params)


def parse_report_to(text: str) -> list[str]:
    """The reporters that `--report-to` names: wandb, tensorboard, both joined by commas, all, or none at all."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in LOGGERS and name != "all"]
    if unknown:
        known = ", ".join([*LOGGERS, "all"])
        raise ConfigError(
            f"--report-to: found {', '.join(map(repr, unknown))}, expected {known} or a comma-separated list"
        )
    return list(LOGGERS) if "all" in names else list(dict.fromkeys(names))


def build_loggers(
    cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any], start_step: int = 0, is_master: bool = True
) -> MetricLoggers:
    """metrics.jsonl and what `--report-to` names; silent on other ranks and with `--logs none`.

    params: the run's flags, recorded without secrets. start_step: the step that a continued run starts from.
    """
    names = parse_report_to(cfg.report_to)
    if not is_master or not paths.enabled:
        if names and is_master:
            logging.warning(f"--logs none writes nothing: --report-to {cfg.report_to} is ignored")
        return MetricLoggers()
    loggers: list[MetricLogger] = [JsonLinesLogger(paths.metrics, start_step)]
    return MetricLoggers(loggers + [LOGGERS.get(name)(cfg, paths, params, start_step) for name in names])
