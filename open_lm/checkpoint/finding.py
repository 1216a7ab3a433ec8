"""Which checkpoint `--resume` means."""

from __future__ import annotations

import logging
import os

from open_lm import storage
from open_lm.checkpoint.files import epoch_number, latest_checkpoint, read_model_state
from open_lm.config import CheckpointConfig, LoggingConfig
from open_lm.distributed import on_master
from open_lm.errors import ConfigError
from open_lm.remote_sync import fetch_logs, remote_folder
from open_lm.run_folder import RunPaths


def find_resume(cfg: CheckpointConfig, logging_cfg: LoggingConfig, paths: RunPaths) -> str | None:
    """The checkpoint that `--resume` means, on all ranks: "latest" is the newest of the run's folder and of its copy
    at `--remote-sync` (the local one where both have it), or None where there is none yet.

    With "latest", logs that are further on in the copy are fetched from there. Without it, ConfigError where the copy
    holds a run of that name already.
    """
    remote = remote_folder(logging_cfg, paths.name)
    if cfg.resume != "latest":
        if remote is not None:
            on_master(lambda: _refuse_existing(remote, paths))
        return cfg.resume

    def newest() -> str | None:
        found = latest_checkpoint(paths.checkpoints) if paths.enabled else None
        if remote is not None:
            copied = latest_checkpoint(storage.join(remote, "checkpoints"))
            if copied is not None and (found is None or _epoch_of(copied) > _epoch_of(found)):
                found = copied
            if paths.enabled and (fetched := fetch_logs(remote, paths.root)):
                logging.info(f"fetched {', '.join(fetched)} from {remote}")
        logging.info(f"--resume latest: {found or 'no checkpoint yet, starting afresh'}")
        return found

    return on_master(newest)


def _refuse_existing(remote: str, paths: RunPaths) -> None:
    if not os.path.exists(paths.log) and storage.exists(storage.join(remote, "out.log")):
        raise ConfigError(
            f"--remote-sync: a run of this name exists already at {remote}; "
            "continue it with --resume latest, or choose another --name"
        )


def _epoch_of(url: str) -> int:
    number = epoch_number(url)
    return int(read_model_state(url)[1].get("epoch", 0)) if number is None else number
