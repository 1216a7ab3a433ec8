"""Log messages to the console and out.log, and metrics to metrics.jsonl, TensorBoard and Weights & Biases.

torch and wandb are imported only when a logger needs them.
"""

from __future__ import annotations

import json
import logging
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
from open_lm.errors import ConfigError, StorageError, missing_package
from open_lm.monitor.run_folder import RunPaths
from open_lm.storage.redaction import redact, redacted
from open_lm.storage.strict_json import json_value, to_json
from open_lm.system.names import printable

_LINE_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
_TIME_FORMAT = "%Y-%m-%d,%H:%M:%S"
_FILE_ONLY = "file_only"  # attribute of the records of `log_to_file`
# At level INFO these loggers report every request or credential lookup.
_VERBOSE_LOGGERS = (
    "botocore",
    "boto3",
    "s3transfer",
    "urllib3",
    "aiobotocore",
    "s3fs",
    "fsspec",
    "asyncio",
    "filelock",
)


# ---------------------------------------------------------------------------------------------- messages
class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


class _RunHandler:
    """A marker for the handlers added by `setup_logging`, so that the next run in this process replaces them."""


class _Console(logging.StreamHandler, _RunHandler):  # Python 3.10 does not accept a type argument here
    def filter(self, record: logging.LogRecord) -> Any:
        """Accept all records but those of `log_to_file`."""
        return not getattr(record, _FILE_ONLY, False) and super().filter(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a closed console: the run and its log file continue."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


class _File(logging.FileHandler, _RunHandler):
    pass


def setup_logging(log_file: str | None = None, level: int = logging.INFO, console_level: int | None = None) -> None:
    """Send the root logger's messages to the console and append them to `log_file` if it is set.

    Lines have the format "2026-01-31,23:59:59 | INFO | message"; secrets are redacted. A second call replaces the
    handlers of the first.
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
            raise StorageError(f"{log_file}: cannot write the log file ({error})") from error
    for handler in handlers:
        handler.setFormatter(_RedactingFormatter(_LINE_FORMAT, _TIME_FORMAT))
        root.addHandler(handler)
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def log_to_file(message: str) -> None:
    """Log a message of level INFO that is too long for the console."""
    logging.info(message, extra={_FILE_ONLY: True})


def write_to_log_file(records: Iterable[logging.LogRecord]) -> None:
    """Write messages to the log file only, for messages that the console has already shown."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _File):
            for record in records:
                handler.handle(record)


def close_logging() -> None:
    """Remove the handlers that `setup_logging` added."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _RunHandler)]:
        root.removeHandler(handler)
        handler.close()


# ---------------------------------------------------------------------------------------------- metrics
class MetricLogger(Protocol):
    """A destination for metrics. `log_texts` is optional."""

    def log(self, values: Mapping[str, Any], step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class JsonLinesLogger:
    """A logger to metrics.jsonl: one JSON object per line with step, time (seconds since the epoch) and the values.

    Each line is appended in a single write. When a run resumes at `start_step`, lines of later steps (written after the
    checkpoint) and incomplete lines are removed first. NaN and infinities are written as null.
    """

    def __init__(self, path: str, start_step: int = 0) -> None:
        self._path = path
        self.rewind(start_step)

    def rewind(self, step: int) -> None:
        filter_lines(self._path, lambda line: isinstance(line["step"], int) and line["step"] <= step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        append_line(self._path, to_json({"step": step, "time": round(time.time(), 3), **values}))

    def close(self) -> None:
        """Do nothing: the file is opened separately for each line."""


def append_line(path: str, line: str) -> None:
    """Append a line to a file.

    A local file gets it in a single write, so lines of several writers do not mix. A remote file is rewritten.
    """
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
        raise StorageError(f"{path}: appended only {written} of {len(data)} bytes; check whether the disk is full")


def filter_lines(path: str, predicate: Callable[[Any], bool]) -> None:
    """Keep only the lines of a JSON lines file that satisfy `predicate`; incomplete or invalid lines are removed."""
    if not os.path.exists(path):
        return
    *lines, incomplete = storage.read_bytes(path).decode("utf-8", errors="replace").split("\n")
    kept = [line for line in lines if _satisfies(line, predicate)]
    if len(kept) < len(lines) or incomplete:
        storage.write_text(path, "".join(f"{line}\n" for line in kept))


def _satisfies(line: str, predicate: Callable[[Any], bool]) -> bool:
    try:
        return predicate(json.loads(line))
    except (ValueError, KeyError, IndexError, TypeError):
        return False


class TensorBoardLogger:
    """A logger to TensorBoard event files in `folder`; resuming at `start_step` hides later steps of earlier files."""

    def __init__(self, folder: str, start_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--report-to tensorboard: {missing_package('tensorboard') or error}, or remove tensorboard "
                "from --report-to"
            ) from error
        is_resumed = os.path.isdir(folder) and bool(os.listdir(folder))
        self._folder, self._open = folder, SummaryWriter
        self._writer = SummaryWriter(folder, purge_step=start_step + 1 if is_resumed else None)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(self._folder, purge_step=step + 1)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for key, value in numbers(values).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        for key, text in texts.items():
            self._writer.add_text(key, as_markdown(text), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A logger to a Weights & Biases run, which is identified by its name when the run resumes.

    With WANDB_MODE=offline or without an API key it is offline: the run is stored in {root}/wandb for `wandb sync`.
    """

    def __init__(self, cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"--report-to wandb: {missing_package('wandb') or error}, or remove wandb from --report-to"
            ) from error
        self._wandb, self._owns_wandb = wandb, wandb.run is None
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        if mode == "offline" and "WANDB_MODE" not in os.environ:
            folder = storage.join(paths.root, "wandb")
            logging.warning(
                f"no Weights & Biases API key was found: the run is stored in {folder}; "
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
        self._run.log({**numbers(values), "step": step})

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        table = self._wandb.Table(columns=["name", "text"], data=[list(item) for item in texts.items()])
        self._run.log({"texts": table, "step": step})

    def rewind(self, step: int) -> None:
        """Do nothing: W&B cannot delete values. Repeated steps add values to the earlier ones."""

    def close(self) -> None:
        self._run.finish()
        if self._owns_wandb:
            self._wandb.teardown()  # waits until wandb's service process has written its files


def _has_wandb_key() -> bool:
    """Return whether an API key is set or stored by `wandb login`. wandb's own function may prompt on a terminal."""
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


def as_markdown(text: str) -> str:
    """Return a text as a code block of Markdown, in which TensorBoard shows it unchanged."""
    return "".join(f"    {line}\n" for line in text.split("\n"))


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among the values; tensors of one element are numbers."""
    return {
        key: value
        for key, value in ((key, json_value(value)) for key, value in values.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class MetricLoggers:
    """The metric loggers of a run behind the interface of a single one; without loggers it does nothing."""

    def __init__(self, loggers: list[MetricLogger] | None = None) -> None:
        self._loggers = loggers or []

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log `values` (numbers or 0-dimensional tensors, by names such as "train/loss") at an optimizer step."""
        for logger in self._loggers:
            logger.log(values, step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Log texts, by name, at an optimizer step, to the loggers that show texts."""
        for logger in self._loggers if texts else ():
            if hasattr(logger, "log_texts"):
                logger.log_texts(texts, step)

    def rewind(self, step: int) -> None:
        """Remove the values of later steps, because the run continues from `step`."""
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Close all loggers, then raise the first failure if there was any."""
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
    """Return the loggers of --report-to: a comma-separated list of names, "all", or an empty string.

    "all" has the entries without the fact `in_all=False`.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in LOGGERS and name != "all"]
    if unknown:
        known = ", ".join([*LOGGERS, "all"])
        raise ConfigError(
            f"--report-to: found {', '.join(map(repr, unknown))}, expected {known} or a comma-separated list"
        )
    if "all" in names:
        names += [name for name in LOGGERS if LOGGERS.fact(name, "in_all", True)]
    return [name for name in dict.fromkeys(names) if name != "all"]


def build_loggers(
    cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any], start_step: int = 0, is_master: bool = True
) -> MetricLoggers:
    """Build the loggers to metrics.jsonl and those of --report-to; none on other ranks and with `--logs none`.

    params: the run's flags, logged with secrets redacted. start_step: the step from which a run resumes.
    """
    names = parse_report_to(cfg.report_to)
    if not is_master or not paths.enabled:
        if names and is_master:
            logging.warning(f"--report-to {cfg.report_to} has no effect with --logs none")
        return MetricLoggers()
    loggers: list[MetricLogger] = [JsonLinesLogger(paths.metrics, start_step)]
    return MetricLoggers(loggers + [LOGGERS.get(name)(cfg, paths, params, start_step) for name in names])
