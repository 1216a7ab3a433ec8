"""The settings of diagnostics: traces of steps and snapshots of the memory of devices. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from open_lm.config.fields import Section, flag
from open_lm.errors import ConfigError


@dataclass(frozen=True)
class DiagnosticsConfig(Section):
    title: ClassVar[str] = "diagnostics"

    profile_steps: str | None = flag(
        None,
        "trace the steps from A to before B, as A:B, counted from 0 at the start of the run; each rank writes a trace "
        "and a table of operations to diagnostics/ in the run's folder; default: none",
    )
    memory_snapshot: bool = flag(
        False,
        "record the allocations of CUDA memory; a rank writes them to diagnostics/ when its memory is exhausted, after "
        "--profile-steps, and when it receives the signal SIGUSR2",
    )

    def problems(self, logs: str) -> list[str]:
        """Return the contradictions with each other and with --logs."""
        if self.profile_steps is None:
            return []
        problems = []
        try:
            parse_steps(self.profile_steps)
        except ConfigError as error:
            problems.append(str(error))
        if logs.lower() == "none":
            problems.append("--profile-steps writes to the run's folder, but --logs none writes none: remove one")
        return problems


def parse_steps(text: str) -> range:
    """Return the steps of --profile-steps A:B. Raise ConfigError if the text has another form."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    steps = range(0) if match is None else range(int(match[1]), int(match[2]))
    if not steps:
        raise ConfigError(f"--profile-steps: found {text!r}, expected A:B with A below B, such as 10:13")
    return steps
