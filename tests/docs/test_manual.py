"""The manual builds without a warning, and a browser that opens it from disk asks nothing of a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dvit_infer as dvit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manual")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(manual):
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(https?:)?//", re.IGNORECASE)
    pages = list(manual.rglob("*.html"))
    assert len(pages) > 20
    assert [page for page in pages if loaded.search(page.read_text())] == []
    assert [style for style in manual.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", style.read_text())] == []


def test_every_public_name_is_in_the_reference(manual):
    page = (manual / "reference" / "api.html").read_text()
    anchors = {name: "serve.ray_data.Classify" if name == "ray" else name for name in dvit.__all__}  # a module
    assert [name for name, anchor in anchors.items() if f'id="dvit_infer.{anchor}"' not in page] == []


@pytest.mark.parametrize("width", [420, 1200])
def test_pages_open_from_disk_and_fit(manual, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 900})
    asked: list[str] = []
    context.route(re.compile("^https?:"), lambda route: (asked.append(route.request.url), route.abort()))
    tab = context.new_page()
    broken: list[str] = []
    tab.on("pageerror", lambda error: broken.append(str(error)))
    for path in sorted(manual.rglob("*.html")):
        tab.goto(path.as_uri())
        if tab.evaluate("document.documentElement.scrollWidth") > width:
            broken.append(f"{path.relative_to(manual)} scrolls sideways")
    context.close()
    assert asked == []
    assert broken == []


def test_the_search_works_from_disk(manual, browser):
    tab = browser.new_page()
    tab.goto((manual / "index.html").as_uri())
    tab.locator("[data-md-component=search-query]").first.fill("prune_tokens")
    found = tab.locator(".md-search-result__link").first
    found.wait_for(state="attached", timeout=20_000)
    assert found.get_attribute("href").startswith("file:")
    tab.close()
