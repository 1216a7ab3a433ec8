"""Flags about the report of a run that the trainer shares with the fine-tuning commands."""

from __future__ import annotations

from typing import Any

from open_lm.config.fields import flag

REPORTS = ("html", "none")
ENERGY_METERS = ("device", "codecarbon", "none")


def report_flag() -> Any:
    """Declare --report."""
    return flag(
        "html",
        "report of the run: html writes report.html to the run's folder at each checkpoint and at the end; none",
        choices=REPORTS,
        advice="metrics go to other loggers with --report-to, such as --report-to wandb",
    )


def energy_flag() -> Any:
    """Declare --energy."""
    return flag(
        "device",
        "energy that environment.json records: device (that of the devices, from their counters, or estimated from "
        "their nominal power or the CPU time); codecarbon (that of the machines, by the package codecarbon, without a "
        "network); none",
        choices=ENERGY_METERS,
    )
