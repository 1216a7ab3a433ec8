"""The report of training runs: one HTML file from what the runs leave on disk.

`records` has the data as dataclasses, `collect` reads them from run folders, `problems` finds problems in them, `page`
turns them into HTML. `figures` and `markup` build self-contained pages of any content. `run_records` keeps what a run
in progress records about itself; `refresh` writes its report.
"""

from __future__ import annotations

from collections.abc import Sequence

REPORT_FILE = "report.html"  # in the folder of a run


def write_report(runs: Sequence[str], out: str, *, title: str | None = None) -> None:
    """Write the report of one or several runs, which are drawn in the same figures. The file appears as a whole.

    Args:
        runs: folders or URLs of runs.
        out: path or URL of the HTML file.
        title: heading of the page; None for the names of the runs.

    Raises:
        UserError: a folder that is no run, a file that cannot be read or written, or a missing package.
    """
    from open_lm import storage
    from open_lm.report.collect import collect_runs
    from open_lm.report.page import build_page

    storage.write_text(out, build_page(collect_runs(runs), title))
