"""The page of a fit in a real browser: figures are drawn, nothing is requested, it fits a phone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from browser import find_browser, open_page

from open_lm.scaling import command


def run_of(params: float, multiplier: float) -> dict[str, Any]:
    loss = 1.8 + 170 * params**-0.27 + 290 * (params * multiplier) ** -0.27
    accuracy = {"copa": 0.14 + 2.2 * math.exp(-0.71 * loss)}
    losses = {"val": [loss, loss - 0.01, loss + 0.01]}
    return {"params": int(params), "tokens": int(params * multiplier), "losses": losses, "accuracy": accuracy}


RUNS = [run_of(params, multiplier) for params in (1e7, 5e7, 2e8, 8e8) for multiplier in (10, 20, 80)]
FIGURES = ("loss-over-compute", "residuals", "error-over-loss", "iso-flop-curves", "compute-optimal-size", "ladder")


@pytest.mark.processes
def test_the_page_of_a_fit_is_drawn_without_errors_or_requests(tmp_path: Path) -> None:
    if find_browser() is None:
        pytest.skip("no Chromium or Chrome is installed")
    table, stored, path = (tmp_path / name for name in ("runs.json", "fit.json", "page.html"))
    table.write_text(json.dumps(RUNS))
    flags = ("--loss", "val", "--law", "over-training", "--error-tasks", "copa", "--resamples", "40")
    command.main(["fit", str(table), *flags, "--predict", "4e9:8e10", "--output", str(stored)])
    table.write_text(json.dumps([run_of(4e9, 20)]))
    command.main(["report", str(stored), str(path), "--measured", str(table)])
    with open_page(path.as_uri(), tmp_path / "profile") as page:
        page.wait_for("document.documentElement.dataset.ready")
        for name in FIGURES:
            drawn = f"document.querySelectorAll('[data-figure=\"{name}\"] .main-svg').length > 0"
            assert page.evaluate(drawn), name
        (x,) = page.evaluate(
            "Array.from(document.querySelector('[data-figure=\"loss-over-compute\"] .plot').data"
            ".find(trace => trace.name === 'measured').x)"
        )
        assert x == pytest.approx(6 * 4e9 * 8e10)
        for dark in (False, True):
            page.emulate(390, 800, dark)
            page.wait_for("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.errors == []
        assert [request for request in page.requests if not request.startswith(("data:", "blob:"))] == [path.as_uri()]
