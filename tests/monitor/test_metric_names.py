"""The table of metric names: complete, unique and documented."""

from __future__ import annotations

from pathlib import Path

from open_lm.monitor.metric_names import METRICS, metric

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_unique_and_documented() -> None:
    names = [entry.name for entry in METRICS]
    assert len(set(names)) == len(names)
    page = (ROOT / "docs/diagnostics.md").read_text(encoding="utf-8")
    missing = [e.name for e in METRICS if f"| `{e.name}` | {e.unit} | {e.description} |" not in page]
    assert not missing, f"docs/diagnostics.md lacks the rows of {missing}"


def test_logged_names_find_their_entry() -> None:
    found = {
        name: getattr(metric(name), "name", None)
        for name in ("train/loss", "icl/arc_easy_10shot", "train/tokens/wiki-en", "val/pile/loss", "val/loss",
                     "train/ema_0.99_loss", "train/reward/exact_match", "icl/time_share", "train/forward_time", "x")
    }  # fmt: skip
    assert found == {
        "train/loss": "train/loss",
        "icl/arc_easy_10shot": "icl/{task}_{shots}shot",
        "train/tokens/wiki-en": "train/tokens/{source}",
        "val/pile/loss": "val/{set}/loss",
        "val/loss": "val/loss",
        "train/ema_0.99_loss": "train/{averager}_loss",
        "train/reward/exact_match": "train/reward/{function}",
        "icl/time_share": "{evaluation}/time_share",
        "train/forward_time": "train/forward_time",
        "x": None,
    }
