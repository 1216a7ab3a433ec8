"""The page in a real browser: figures, tooltips, overlaid runs, themes, accessibility, no request; and its HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from browser import Page, find_browser, open_page
from report_runs import ATTACK, SPIKE_STEP, STEPS, write_run

from open_lm.report import write_report
from open_lm.report.collect import collect_run
from open_lm.report.figures import MAX_PAGE_BYTES, Figure, Series
from open_lm.report.figures import Page as ReportPage
from open_lm.report.formats import big
from open_lm.report.markup import Html, escape, tag
from open_lm.report.page import build_page
from open_lm.report.records import Metric, Metrics, Run

PHONE, DESKTOP = (390, 844), (1280, 900)


# ---------------------------------------------------------------------------------------------- without a browser
def test_everything_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run<i>", model="<b>model</b>.json")
    write_report([str(run)], str(tmp_path / "report.html"), title="A & B <u>")
    html = (tmp_path / "report.html").read_text()
    assert ATTACK not in html and "&lt;/script&gt;&lt;script&gt;document.title" in html
    assert "<title>A &amp; B &lt;u&gt;</title>" in html and "&lt;b&gt;model&lt;/b&gt;" in html and "run<i>" not in html
    assert html.count("<script") == html.count("</script>") == 4, "theme, data, plotly, code"
    assert escape("\x00\ud800a\x7f<") == "␀\\ud800a␡&lt;" and tag("p", Html("<b>"), "<", id=None) == "<p><b>&lt;</p>"


def test_no_address_is_loaded(tmp_path: Path) -> None:
    found: list[str] = []

    class Addresses(HTMLParser):
        def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
            found.extend(f"{name} {key}={value}" for key, value in attributes if key in ("src", "href", "action"))

    write_report([str(write_run(tmp_path / "run"))], str(tmp_path / "report.html"))
    Addresses().feed((tmp_path / "report.html").read_text())
    assert found and all(re.fullmatch(r"a href=#[a-z-]+", address) for address in found)


def test_many_long_runs_stay_below_5_mb() -> None:
    steps = np.arange(1, 20_001)
    noise = np.random.default_rng(0).random(len(steps)).astype(np.float32)
    rows = np.arange(len(steps), dtype=np.int32)
    metrics = Metrics(steps, steps * 0.5, steps * 4096.0, {f"train/m{i}_loss": Metric(rows, noise) for i in range(40)})
    runs = [Run(f"logs/{i}", f"run {i}", metrics=metrics) for i in range(16)]
    assert 2_000_000 < len(build_page(runs).encode()) < MAX_PAGE_BYTES


# ---------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write a report of one run, one of two runs and a page of a plain figure, and return their addresses."""
    folder = tmp_path_factory.mktemp("reports")
    first, second = write_run(folder / "first"), write_run(folder / "second", steps=150, lr="0.002")
    write_report([str(first)], str(folder / "one.html"))
    write_report([str(first), str(second)], str(folder / "two.html"))
    plain = ReportPage("Fits")
    points = Series(
        "runs", [1e15, 1e16, 1e17], [4.0, 3.5, 3.1], mode="markers", low=[3.9, 3.4, 3.0], high=[4.2, 3.6, 3.2]
    )
    figure = Figure("Loss", x_label="compute (FLOP)", y_label="loss", series=[points], x_log=True)
    plain.section("Losses", plain.figure(figure))
    (folder / "plain.html").write_text(plain.html())
    return {name: (folder / f"{name}.html").as_uri() for name in ("one", "two", "plain")}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if find_browser() is None:
        pytest.skip("no Chromium or Chrome is installed")
    with open_page("about:blank", tmp_path_factory.mktemp("profile"), *DESKTOP) as page:
        yield page


def show(page: Page, address: str, width: int = DESKTOP[0], height: int = DESKTOP[1], dark: bool = False) -> None:
    """Open a report, unless it is open, and wait until its figures are drawn."""
    page.emulate(width, height, dark)
    if page.evaluate("location.href") != address:
        page.requests.clear()
        page.errors.clear()
        page.open(address)
        page.wait_for("document.documentElement.dataset.ready")
    assert page.evaluate("document.getElementById('message').hidden"), page.evaluate("document.body.innerText")


def check_clean(page: Page, address: str) -> None:
    """Require that a page has neither errors nor requests for anything but itself."""
    assert page.errors == []
    assert [request for request in page.requests if not request.startswith(("data:", "blob:"))] == [address]


def curve(page: Page, title: str, trace: int = 0) -> dict[str, list[float]]:
    """Return x and y of a curve of a figure."""
    script = f"(() => {{ const t = document.querySelector('[data-figure=\"{title}\"] .plot').data[{trace}];"
    return page.evaluate(f"{script} return {{x: Array.from(t.x), y: Array.from(t.y)}}; }})()")  # type: ignore[no-any-return]


def set_smoothing(page: Page, value: float) -> None:
    event = "dispatchEvent(new Event('input', {bubbles: true}))"
    page.evaluate(f"{{ const s = document.getElementById('smoothing'); s.value = {value}; s.{event}; }}")


@pytest.mark.processes
def test_figures_are_drawn_without_errors_or_requests(page: Page, pages: dict[str, str]) -> None:
    show(page, pages["one"])
    assert page.evaluate("document.querySelectorAll('.plot .main-svg').length") > 20
    drawn = curve(page, "training-loss")
    assert page.evaluate("document.getElementById('smoothing-value').value") == "0.60", "of a curve of many points"
    assert len(drawn["x"]) == STEPS and drawn["x"][-1] == STEPS * 4096
    assert max(drawn["y"][100:]) == drawn["y"][SPIKE_STEP - 1] > 5
    assert page.evaluate("document.title") == "Run first", "no text of a sample has run as a script"
    page.evaluate("document.querySelector('#axis input[value=hours]').click()")
    assert curve(page, "training-loss")["x"][-1] == pytest.approx((600 + 0.5 * (STEPS - 1)) / 3600)
    set_smoothing(page, 0.9)
    assert max(curve(page, "training-loss", 1)["y"][100:]) < 4, "the smoothed curve"
    assert max(curve(page, "training-loss", 0)["y"][100:]) > 5, "the spike remains visible"
    check_clean(page, pages["one"])


@pytest.mark.processes
def test_tooltip_shows_the_values(page: Page, pages: dict[str, str]) -> None:
    show(page, pages["one"])
    page.evaluate("document.querySelector('#axis input[value=step]').click()")
    figure = "document.querySelector('#figure-training-loss')"
    page.evaluate(f"{figure}.scrollIntoView()")
    box = page.evaluate(f"{figure}.querySelector('.nsewdrag').getBoundingClientRect().toJSON()")
    page.move_mouse(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for(f"{figure}.querySelector('.hoverlayer').textContent.includes('Training loss')")


@pytest.mark.processes
def test_plain_figure_has_its_own_axis(page: Page, pages: dict[str, str]) -> None:
    show(page, pages["plain"])
    assert curve(page, "loss")["x"] == [1e15, 1e16, 1e17] and not page.evaluate("document.querySelector('.controls')")
    check_clean(page, pages["plain"])


@pytest.mark.processes
def test_two_runs_in_one_figure(page: Page, pages: dict[str, str]) -> None:
    show(page, pages["two"])
    set_smoothing(page, 0)
    first, second = curve(page, "training-loss", 0), curve(page, "training-loss", 1)
    assert (len(first["x"]), len(second["x"])) == (STEPS, 150)
    colors = "Array.from(document.querySelector('#figure-training-loss .plot').data).slice(0, 2).map(t => t.line.color)"
    assert len(set(page.evaluate(colors))) == 2
    page.evaluate("document.querySelector('#runs input').click()")
    assert curve(page, "training-loss")["x"] == second["x"], "only the second run is left"
    page.evaluate("document.querySelector('#runs input').click()")
    table = page.evaluate("document.querySelector('#settings table').innerText")
    assert re.search(r"lr\s+0\.001\s+0\.002", table)
    check_clean(page, pages["two"])


@pytest.mark.processes
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_accessible_in_both_themes(page: Page, pages: dict[str, str], dark: bool) -> None:
    spec = find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe_core_python is not installed")
    show(page, pages["two"], dark=dark)
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    (script,) = Path(spec.origin).parent.rglob("axe.min.js")
    page.evaluate(script.read_text(encoding="utf-8"))
    page.evaluate("document.querySelectorAll('main > section > details').forEach(item => { item.open = true; })")
    options = "{resultTypes: ['violations']" + (", runOnly: ['color-contrast']}" if dark else "}")
    listed = "v => `${v.id}: ${v.nodes.slice(0, 3).map(node => node.html).join(' | ')}`"
    checked = "{exclude: [['figure:not(:first-of-type) .main-svg']]}"  # drawn like that of the first figure
    problems = page.evaluate(f"axe.run({checked}, {options}).then(result => result.violations.map({listed}))")
    assert problems == []


@pytest.mark.processes
def test_fits_a_phone_and_works_by_keyboard(page: Page, pages: dict[str, str]) -> None:
    show(page, pages["two"], *PHONE)
    # Figures take the width of the window some frames after it has changed; then nothing scrolls sideways.
    page.wait_for("document.documentElement.scrollWidth === document.documentElement.clientWidth")
    assert page.evaluate("document.querySelector('.plot .main-svg').getBoundingClientRect().width") <= PHONE[0]
    page.evaluate("document.querySelector('.skip').focus()")
    page.press("Tab", 9)
    page.press("Enter", 13)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark", "the button of the theme"


@pytest.mark.processes
def test_without_decompression_the_tables_remain(page: Page, pages: dict[str, str]) -> None:
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream;")
    try:
        page.open(pages["one"])
        page.wait_for("document.documentElement.dataset.ready")
        assert "The tables below them have their values" in page.evaluate(
            "document.getElementById('message').innerText"
        )
        assert page.evaluate("document.querySelectorAll('figure table tbody tr').length") > 50
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def test_summary_of_a_run_in_words(tmp_path: Path) -> None:
    html = build_page([collect_run(str(write_run(tmp_path / "run")))])
    text = re.sub(r"<[^>]+>", "", html)
    assert (
        "Model tiny (12.3k trained parameters) was trained for 200 steps, all that were planned, on 819k tokens" in text
    )
    assert (
        "The training loss fell from 5.646 to" in text
        and "The last validation loss is 2.0000 (perplexity 7.389)" in text
    )
    assert "1.00 kWh" in text and "4.00 PFLOP" in text


def test_losses_of_unequal_validation_sets_are_not_compared(tmp_path: Path) -> None:
    runs = [collect_run(str(write_run(tmp_path / name))) for name in ("a", "b")]
    assert "a has the lowest final validation loss: 2.0000" in build_page(runs)
    results = tmp_path / "b" / "checkpoints" / "results.jsonl"
    results.write_text(results.read_text().replace('"tokens": 6400', '"tokens": 640'))
    html = build_page([runs[0], collect_run(str(tmp_path / "b"))])
    assert "differ in name or number of tokens" in html and "lowest final validation loss" not in html


def test_the_sources_within_a_data_set_are_listed(tmp_path: Path) -> None:
    write_report([str(write_run(tmp_path / "run"))], str(tmp_path / "report.html"))
    table = (tmp_path / "report.html").read_text().partition("Sources within a data set")[2].partition("</table>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)", table)
    assert cells == ["wiki", big(600_000), "25.0 %", "news", big(1_800_000), "75.0 %"]
    assert table.count("web/manifest.jsonl") == 2 and "books" not in table
