"""The report's page in headless Chromium: no word on the console, charts, sorting, narrow and dark."""

from collections.abc import Iterator
from typing import Any

import pytest
from report_content import BATCHES, CANDIDATES, RATES, content, full, model_row

from dvit_infer.benchmark.report.page import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page of everything; at the end nothing may have been said on the console or asked of a network."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, full())
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_default_timeout(10_000)
    tab.goto(path.as_uri())
    tab.wait_for_selector(".chart .main-svg")
    yield tab
    tab.close()
    assert said == []
    assert asked == [path.as_uri()]


def test_every_chart_is_there(opened):
    count = "nodes => nodes.map(n => [n.querySelectorAll('.barlayer .point path').length, {}])"
    drawn = opened.eval_on_selector_all(
        ".chart", count.format("n.querySelectorAll('.scatterlayer .trace').length, n.clientHeight > 100")
    )
    drawn = [(bars, lines) for bars, lines, *_ in drawn]
    candidates = len(CANDIDATES)
    sweep = len(RATES) - 1
    latency = [(candidates, 1), (candidates + sweep, 1), (candidates, 1)]
    assert drawn == [(0, candidates + sweep), *latency, (0, 3), (28, 2)]
    marks = opened.eval_on_selector_all(".chart", "ns => ns.map(n => n.querySelectorAll('.points path.point').length)")
    assert marks == [candidates * len(BATCHES) + sweep, candidates, candidates + sweep, candidates, len(RATES) + 1, 28]


@pytest.mark.parametrize(("table", "heading"), [(0, "images/s"), (0, "batch"), (1, "µs"), (2, "GB/s")])
def test_a_heading_sorts_numbers_up_and_then_down(opened, table, heading):
    place = opened.locator("table").nth(table)
    button = place.get_by_role("button", name=heading, exact=True)
    column = opened.evaluate("b => b.parentElement.cellIndex", button.element_handle())

    def cells() -> list[float]:
        texts = place.locator(f"tbody tr td:nth-child({column + 1})").all_text_contents()
        return [float(text.replace(",", "")) for text in texts if text != "-"]

    before = cells()
    assert before != sorted(before) or len(before) == 1 or heading == "batch"
    button.focus()
    opened.keyboard.press("Enter")
    assert cells() == sorted(before)
    assert place.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    button.click()
    assert cells() == sorted(before, reverse=True)
    assert place.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_text_sorts_too_and_what_is_unknown_stays_last(opened):
    place = opened.locator("table").nth(0)
    place.get_by_role("button", name="runtime", exact=True).click()
    candidates = place.locator("tbody tr td:first-child").all_text_contents()
    assert candidates == sorted(candidates)
    for _ in range(2):
        place.get_by_role("button", name="peak MiB", exact=True).click()
        peaks = place.locator("tbody tr td:last-child").all_text_contents()
        assert peaks[-len(BATCHES) :] == ["-"] * len(BATCHES)


@pytest.mark.parametrize("width", [420, 1200])
def test_the_page_does_not_scroll_sideways_and_charts_fit(opened, width):
    opened.set_viewport_size({"width": width, "height": 900})
    opened.wait_for_function(
        "[...document.querySelectorAll('.chart')].every("
        "c => Math.abs(c.querySelector('.main-svg').clientWidth - c.clientWidth) < 2)"
    )
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    right = opened.eval_on_selector_all(".chart", "nodes => nodes.map(n => n.getBoundingClientRect().right)")
    assert max(right) <= width
    if width == 420:
        assert opened.eval_on_selector(".scroll", "box => box.scrollWidth > box.clientWidth")


def test_the_dark_scheme_changes_page_and_charts(opened):
    def colors() -> tuple[str, str, str]:
        ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        text = opened.eval_on_selector(".chart .xtick text", "node => getComputedStyle(node).fill")
        return ground, text, opened.eval_on_selector(".chart .barlayer path", "node => getComputedStyle(node).fill")

    light = colors()
    opened.emulate_media(color_scheme="dark")
    opened.wait_for_function("getComputedStyle(document.querySelector('.xtick text')).fill !== 'rgb(28, 33, 40)'")
    dark = colors()
    assert all(a != b for a, b in zip(light, dark, strict=True))
    opened.emulate_media(color_scheme="light")
    opened.wait_for_function("getComputedStyle(document.querySelector('.xtick text')).fill === 'rgb(28, 33, 40)'")
    assert colors() == light


@pytest.mark.slow
def test_strange_texts_are_shown_as_they_are(browser, tmp_path):
    rows = [model_row("engine", 8, variant="<b>bold</b> & </script>"), model_row("dense", 8)]
    write_report(tmp_path / "odd.html", content(*rows))
    tab = browser.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((tmp_path / "odd.html").as_uri())
    tab.wait_for_selector(".chart .main-svg")
    ticks = tab.locator(".chart").first.locator(".ytick text").all_text_contents()
    tab.close()
    assert ticks[0] == "engine (<b>bold</b> & </script>), keep 0.7"
    assert said == []
