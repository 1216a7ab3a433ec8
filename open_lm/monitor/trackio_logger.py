"""Log metrics and texts to trackio, which keeps them in a database on this machine.

`trackio show` opens its dashboard. TRACKIO_DIR selects the folder of the database; nothing leaves the machine unless
TRACKIO_SPACE_ID or TRACKIO_SERVER_URL ask for it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
from collections.abc import Mapping
from typing import Any

from open_lm.config.registry import LOGGERS
from open_lm.config.sections import LoggingConfig
from open_lm.errors import ConfigError, missing_package
from open_lm.monitor.loggers import as_markdown, numbers
from open_lm.monitor.run_folder import RunPaths
from open_lm.storage.redaction import redacted


class TrackioLogger:
    """A logger to a trackio run, which is identified by its name when the run resumes."""

    def __init__(self, cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any], resumes: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # banners
            try:
                import trackio
            except ImportError as error:
                raise ConfigError(
                    f"--report-to trackio: {missing_package('trackio') or error}, or remove trackio from --report-to"
                ) from error
            self._trackio = trackio
            self._run = trackio.init(
                project=cfg.wandb_project_name,
                name=paths.name,
                config={key: str(value) for key, value in redacted(params).items()},
                resume="allow" if resumes else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        project = shlex.quote(cfg.wandb_project_name)
        logging.info(f"trackio stores the run on this machine; show it with: trackio show --project {project}")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log(numbers(values), step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        self._run.log({name: self._trackio.Markdown(as_markdown(text)) for name, text in texts.items()}, step)

    def rewind(self, step: int) -> None:
        """Do nothing: trackio cannot delete values. Repeated steps add values to the earlier ones."""

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


@LOGGERS.register("trackio", help="trackio, in a database on this machine", in_all=False)
def _open_trackio(cfg: LoggingConfig, paths: RunPaths, params: Mapping[str, Any], start_step: int) -> TrackioLogger:
    return TrackioLogger(cfg, paths, params, resumes=start_step > 0)
