"""The reports in a real browser: what is drawn, what is readable, and what fits, in both colour schemes and sizes."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from layerkv.bench.demo import as_case
from layerkv.bench.suite import summary
from layerkv.bench.suite.report import write_report
from layerkv.config import default_policy
from tests.browser.chromium import Page, browser_page, find_chromium
from tests.unit.bench import made_records
from tests.unit.bench.suite import made_results as made

LOOKS = [(scheme, size) for scheme in ("light", "dark") for size in ((390, 844), (1280, 900))]
READABLE_CONTRAST = 4.5
PLOTS = ("fluid", "ttft", "goodput", "attainment", "cdf")

# What lies in every plot: its size, the marks without any size, and the marks that leave the plot's panel.
DRAWN = """
[...document.querySelectorAll('svg[role=img]')].map(svg => {
  const panel = svg.closest('.panel').getBoundingClientRect(), area = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('path, use, text')].filter(mark => !mark.closest('defs'));
  const boxes = marks.map(mark => [mark.outerHTML.slice(0, 80), mark.getBoundingClientRect()]);
  const outside = box => box.left < panel.left - 1 || box.right > panel.right + 1
      || box.top < panel.top - 1 || box.bottom > panel.bottom + 1;
  return {
    label: svg.getAttribute('aria-label'), width: area.width, height: area.height, marks: marks.length,
    flat: boxes.filter(([html, box]) => box.width + box.height <= 0 && !/<path/.test(html)).map(it => it[0]),
    outside: boxes.filter(([, box]) => outside(box)).map(([html]) => html),
  };
})
"""

# Pairs of neighbouring labels on a horizontal axis that run into each other.
OVERLAPS = """
[...document.querySelectorAll('.x-axis')].flatMap(axis => {
  const all = [...axis.querySelectorAll('text')], top = Math.min(...all.map(it => it.getBoundingClientRect().top));
  const labels = all.filter(label => label.getBoundingClientRect().top < top + 2);  // the others are the axis's title
  const pairs = labels.slice(1).map((label, index) => [labels[index], label]);
  return pairs.filter(([a, b]) => a.getBoundingClientRect().right + 2 > b.getBoundingClientRect().left)
      .map(([a, b]) => a.textContent + ' | ' + b.textContent);
})
"""

LINES = """
Object.fromEntries([...document.querySelectorAll('figure[id^=plot-]:not(.engine)')].map(figure => {
  const panel = figure.querySelector('.panel').getBoundingClientRect();
  const groups = [...figure.querySelectorAll('g.engine')].filter(group => group.getBoundingClientRect().width > 20);
  const lines = groups.map(group => {
    const line = group.querySelector('path'), box = line.getBoundingClientRect();
    const inside = box.left >= panel.left - 1 && box.right <= panel.right + 1
        && box.top >= panel.top - 1 && box.bottom <= panel.bottom + 1;
    return [group.classList[group.classList.length - 1], inside && box.width > 20, getComputedStyle(line).stroke];
  });
  return [figure.id.slice(5), lines];
}))
"""

# Contrast of text with what lies behind it, by WCAG 2.1; the least of all places that have text of their own.
CONTRAST = """
(() => {
  const channels = colour => colour.match(/[0-9.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = channels(colour).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  let least = [21, ''];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !element.getClientRects().length || element.tagName === 'title') continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(element.tagName === 'text' ? style.fill : style.color), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 120)];
  }
  return least;
})()
"""

Check = Callable[[Page], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def chromium() -> str:
    return program_or_skip(find_chromium())


def program_or_skip(program: str | None) -> str:
    if program is None:
        reason = "no Chromium is installed; install chromium or google-chrome"
        if os.environ.get("LAYERKV_REQUIRE_TOOLS") == "1":
            pytest.fail(f"LAYERKV_REQUIRE_TOOLS=1, but {reason}")
        pytest.skip(reason)
    return program


def test_without_chromium_tests_skip_or_fail_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERKV_REQUIRE_TOOLS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium is installed"):
        program_or_skip(None)
    monkeypatch.setenv("LAYERKV_REQUIRE_TOOLS", "1")
    with pytest.raises(pytest.fail.Exception, match="LAYERKV_REQUIRE_TOOLS=1, but no Chromium"):
        program_or_skip(None)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports by name: all engines at five points, one short point with failures, and the demo's."""
    folder = tmp_path_factory.mktemp("reports")
    paths = {name: folder / f"{name}.html" for name in ("full", "short", "demo")}
    runs = made.load_runs()
    write_report(made.case_result(runs, main="rate-6"), runs, paths["full"], made.POLICY)
    short = made.load_runs(rates=(6.0,), engines=("vllm-cpu-offload", "layerkv"), seeds=(0,), num_requests=20)
    short.append(made.load_run("stock", 6.0, 0, num_requests=20, num_failed=5))
    interrupted = made.case_result(short, {"oracle": made.FAILURE}, interrupted=True)
    write_report(interrupted, short, paths["short"], made.POLICY)
    write_report(*as_case(made_records.result(), made_records.all_runs()), paths["demo"], default_policy())
    return paths


def in_browser(program: str, check: Check) -> None:
    async def run() -> None:
        async with browser_page(program) as page:
            await check(page)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["full", "short", "demo"])
def test_a_report_is_drawn_and_fits_on_phone_and_desktop_in_light_and_dark(
    chromium: str, reports: dict[str, Path], name: str
) -> None:
    async def check(page: Page) -> None:
        backgrounds = {}
        for scheme, (width, height) in LOOKS:
            await page.show(reports[name], width=width, height=height, scheme=scheme)
            look = f"{name}, {scheme}, {width} px"
            assert page.problems == [], look
            document = await page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert document[0] <= document[1] <= width, look
            plots = await page.evaluate(DRAWN)
            assert plots, look
            for plot in plots:
                assert plot["width"] > 60, (look, plot)
                assert plot["height"] > 10, (look, plot)
                assert plot["marks"], (look, plot)
                assert plot["flat"] == [], (look, plot["label"])
                assert plot["outside"] == [], (look, plot["label"])
            assert await page.evaluate(OVERLAPS) == [], look
            contrast, where = await page.evaluate(CONTRAST)
            assert contrast >= READABLE_CONTRAST, (look, where)
            backgrounds[scheme] = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert backgrounds["light"] != backgrounds["dark"]

    in_browser(chromium, check)


def test_every_engine_has_its_line_and_its_colour_in_every_plot(chromium: str, reports: dict[str, Path]) -> None:
    async def check(page: Page) -> None:
        for scheme, (width, height) in LOOKS:
            await page.show(reports["full"], width=width, height=height, scheme=scheme)
            plots = await page.evaluate(LINES)
            assert plots.keys() == set(PLOTS)
            for lines in plots.values():
                assert {engine for engine, is_inside, _ in lines if is_inside} == set(summary.ENGINE_TITLES)
                assert len({colour for _, _, colour in lines}) == len(summary.ENGINE_TITLES)

    in_browser(chromium, check)


def test_a_click_on_an_engine_hides_it_everywhere_and_another_shows_it_again(
    chromium: str, reports: dict[str, Path]
) -> None:
    async def check(page: Page) -> None:
        await page.show(reports["full"], width=1280, height=900, scheme="light")
        shown = "[...document.querySelectorAll('.engine.stock')].filter(e => e.getClientRects().length).length"
        others = "[...document.querySelectorAll('.engine.layerkv')].filter(e => e.getClientRects().length).length"
        before = [await page.evaluate(shown), await page.evaluate(others)]
        assert min(before) > 0
        click = "document.querySelector('#show-stock').parentElement.click()"
        await page.evaluate(click)
        assert [await page.evaluate(shown), await page.evaluate(others)] == [0, before[1]]
        await page.evaluate(click)
        assert [await page.evaluate(shown), await page.evaluate(others)] == before

    in_browser(chromium, check)


def test_the_legend_stays_in_sight_beside_the_plots(chromium: str, reports: dict[str, Path]) -> None:
    async def check(page: Page) -> None:
        await page.show(reports["full"], width=390, height=844, scheme="light")
        await page.evaluate("document.querySelector('#plot-memory-oracle').scrollIntoView({block: 'center'})")
        top, bottom = await page.evaluate(
            "(box => [box.top, box.bottom])(document.querySelector('.keys').getBoundingClientRect())"
        )
        assert 0 <= top < bottom < 844 / 4

    in_browser(chromium, check)


def test_a_page_that_throws_or_lacks_a_file_is_noticed(chromium: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><img src='missing.png'><script>console.error('one'); throw Error('two')</script>")

    async def check(page: Page) -> None:
        await page.show(broken, width=390, height=844, scheme="light")
        problems = "\n".join(page.problems)
        assert all(sign in problems for sign in ("one", "two", "request failed"))

    in_browser(chromium, check)
