"""What all parts of a bundle are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_lm.release.components import COMPONENTS
from open_lm.release.datasets import DataFolder
from open_lm.release.mof_file import DISTRIBUTION
from open_lm.release.privacy import Redactor
from open_lm.release.run_facts import RunFacts
from open_lm.release.settings import BundleSettings

if TYPE_CHECKING:
    from open_lm.report.records import Run

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Context:
    """The run and the settings of a bundle.

    Attributes:
        settings: of the bundle.
        facts: the files of the run.
        run: what its report shows.
        folders: its training data.
        redactor: removes private paths and names from texts.
        bundle: the folder that is written.
    """

    settings: BundleSettings
    facts: RunFacts
    run: Run
    folders: tuple[DataFolder, ...]
    redactor: Redactor
    bundle: Path

    @property
    def name(self) -> str:
        return self.settings.name or self.facts.name

    @property
    def is_pretrained(self) -> bool:
        """Whether the run trained from scratch, and did not continue from other weights."""
        return self.facts.params.get("pretrained", "None") in ("None", "")

    @property
    def producer(self) -> str:
        return self.settings.producer or ""

    @cached_property
    def end_time(self) -> datetime:
        """The time of the last metric in UTC, else of the final checkpoint: the date of everything in the bundle."""
        times = self.run.metrics.times
        known = times[np.isfinite(times)]
        seconds = float(known.max()) if len(known) else self._checkpoint_time()
        return datetime.fromtimestamp(int(seconds), timezone.utc)

    def _checkpoint_time(self) -> float:
        times = [item.modified for item in self.run.checkpoints if item.modified is not None]
        return max(times, default=0.0)

    @property
    def date(self) -> str:
        """The day on which the training ended, as YYYY-MM-DD."""
        return self.end_time.date().isoformat()

    @cached_property
    def starts(self) -> list[Mapping[str, Any]]:
        """The starts of the run in environment.json, empty without the file."""
        return [dict(start) for start in self.run.environment.get("starts", [])]

    @property
    def packages(self) -> Mapping[str, str]:
        """Versions of the packages at the last start of the run; empty if the run does not record them."""
        return dict(self.starts[-1].get("packages", {})) if self.starts else {}

    def license_of(self, component: str) -> str | None:
        """Return the license of a component as the settings state it: its own, that of its kind, or the general one."""
        licenses = self.settings.licenses
        scopes = (component, COMPONENTS[component].kind, DISTRIBUTION)
        return next((licenses[scope] for scope in scopes if scope in licenses), None)
