"""The report's page: what appears for which rows, and what is escaped."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from report_content import BATCHES, CANDIDATES, RATES, content, full, limit_rows, model_row, node_rows

from dvit_infer.benchmark.report.page import page, write_report
from dvit_infer.errors import InputError

EVIL = "</script><b onclick='x()'>&lt;é%{y}$x$\u2028\ud800"


class _Parts(HTMLParser):
    """Headings, cells, attributes that name resources, and the figures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.charts = 0
        self.figures: list[dict[str, Any]] = []
        self._open: list[str] = []
        self._is_figures = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self._open.append(tag)
        self.references += [str(given[key]) for key in ("src", "href", "data", "srcset", "action") if key in given]
        self.charts += given.get("class") == "chart"
        self._is_figures = given.get("id") == "figures"

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._is_figures and self._open[-1:] == ["script"]:
            self.figures = json.loads(data)
        elif self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def parts(*rows: dict[str, Any], **environment: Any) -> _Parts:
    return _Parts(page(content(*rows, **environment)))


def traces(figure: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [trace for trace in figure["data"] if trace["type"] == kind]


def test_the_page_of_everything():
    found = _Parts(page(full()))
    titles = found.texts["h2"]
    assert titles[:4] == ["Speed and accuracy", "Images/s against batch", "Latency", "Keep-rate sweep"]
    assert re.fullmatch(r"Time per node, batch 8: 166\.81 ms in all, floors 101\.74 ms, 61% of it", titles[4])
    assert titles[5:] == ["Measured limits of this machine"]
    assert found.texts["h1"] == ["dynamicvit-deit-s on intel-xeon-processor-2-threads"]
    assert "uint8" not in " ".join(found.texts["dd"])  # of a limit, not of the model
    for fact in ("2.13.0", "0123456789ab", "2026-11-24T10:00:00", "float32"):
        assert fact in found.texts["dd"]
    assert "triton" in found.texts["dt"]
    assert "gpu" not in found.texts["dt"]  # null
    assert found.charts == len(found.figures) == 1 + len(BATCHES) + 1 + 1


def test_plotly_knows_every_word_of_the_figures():
    for figure in _Parts(page(full())).figures:
        text = re.sub(r'"--[a-z]+"', '"#123456"', json.dumps(figure))  # colours are the style sheet's
        go.Figure(json.loads(text))


def test_only_what_the_rows_allow_is_drawn():
    found = parts(*(model_row(runtime, 8) for runtime in CANDIDATES))
    assert found.texts["h2"] == ["Speed and accuracy", "Images/s", "Latency"]
    assert len(traces(found.figures[0], "bar")) == len(CANDIDATES)
    assert parts(*node_rows()).texts["h2"][0].startswith("Time per node")
    assert parts(*limit_rows()).texts["h2"] == ["Measured limits of this machine"]
    assert parts().texts["p"] == ["There are no rows."]
    other = [row | {"runtime": "kernel"} for row in limit_rows()]
    assert parts(*other).texts["h2"] == ["Single ops"]


def test_a_file_of_version_1_gives_the_same_page():
    new = full()
    old_names = {"runtime": "how", "variant": "mode", "gmacs": "gflops"}
    rows = [{old_names.get(key, key): value for key, value in row.items()} for row in new["rows"]]
    assert page({"environment": new["environment"], "rows": rows}) == page(new)
    with pytest.raises(InputError, match="version 3"):
        page(new | {"version": 3})


def test_lines_and_bars_carry_the_rows():
    lines, *latency = _Parts(page(full())).figures[: 1 + len(BATCHES)]
    by_name = {trace["name"]: trace for trace in lines["data"]}
    assert set(by_name) == {
        *("engine, keep 0.7", "dense", "reference, keep 0.7", "compile (default), keep 0.7"),
        *(f"engine, keep {rate}" for rate in RATES if rate != 0.7),
    }
    for row in full()["rows"]:
        if "op" in row or row["runtime"] != "dense":
            continue
        at = by_name["dense"]["x"].index(row["batch"])
        assert by_name["dense"]["y"][at] == row["images_per_s"]
        bars = by_name["dense"]["error_y"]
        assert row["images_per_s"] + bars["array"][at] == pytest.approx(row["p80_images_per_s"])
        assert row["images_per_s"] - bars["arrayminus"][at] == pytest.approx(row["p20_images_per_s"])
    assert by_name["dense"]["x"] == list(BATCHES)
    assert [len(traces(figure, "bar")) for figure in latency] == [4, 8, 4]
    assert {t["marker"]["color"] for t in traces(latency[0], "bar")} == {t["line"]["color"] for t in lines["data"]}


def test_the_sweep_has_the_dense_row_and_what_macs_allow():
    dense = model_row("dense", 8)
    rows = [dense, *(model_row("engine", 8, rate) for rate in reversed(RATES))]
    engine, point, allowed = parts(*rows).figures[-1]["data"]
    assert engine["x"] == list(RATES)
    assert (point["x"], point["y"]) == ([1.0], [dense["images_per_s"]])
    assert allowed["x"] == [*RATES, 1.0]
    expected = [dense["images_per_s"] * dense["gmacs"] / model_row("engine", 8, rate)["gmacs"] for rate in RATES]
    assert allowed["y"] == pytest.approx([*expected, dense["images_per_s"]])
    (alone,) = parts(*rows[1:]).figures[-1]["data"]  # without a dense row nothing says what is allowed
    assert alone["x"] == list(RATES)


def test_nodes_stand_in_the_order_of_the_graph_with_their_floors():
    rows = node_rows()
    figure = parts(*rows).figures[0]
    (bars,) = traces(figure, "bar")
    assert bars["x"] == [row["us"] / 1e3 for row in rows]
    assert figure["layout"]["yaxis"]["ticktext"] == [row["op"] for row in rows]
    assert figure["layout"]["yaxis"]["range"] == [len(rows) - 0.5, -0.5]  # the first on top
    floors = [list(filter(None, at)) for at in zip(*(t["x"] for t in traces(figure, "scatter")), strict=True)]
    assert floors == [[row["floor_us"] / 1e3] for row in rows]
    two = parts(*rows, *(row | {"batch": 1} for row in rows))
    assert two.charts == 2


def test_a_p99_far_off_is_an_arrow_at_the_end_of_the_axis():
    rows = [model_row("engine", 8, p50_ms=10.0, p99_ms=900.0), model_row("dense", 8, p50_ms=20.0, p99_ms=30.0)]
    figure = parts(*rows).figures[1]
    ticks, arrow = traces(figure, "scatter")
    assert ticks["x"] == [None, 30.0]
    assert (arrow["x"], arrow["y"]) == ([80.0], [0])
    assert arrow["customdata"] == ["engine, keep 0.7: 900 ms, p99"]
    assert figure["layout"]["xaxis"]["range"] == [0, 84.0]


def test_ways_that_differ_in_nothing_but_model_or_dtype_have_names_of_their_own():
    rows = [model_row("engine", 8, dtype=dtype) for dtype in ("float32", "bfloat16")]
    ticks = parts(*rows).figures[0]["layout"]["yaxis"]["ticktext"]
    assert ticks == ["engine, keep 0.7, float32", "engine, keep 0.7, bfloat16"]


def test_nothing_of_a_file_is_markup(tmp_path):
    rows = [model_row("engine", 8, model=EVIL, variant=EVIL, baseline=EVIL), model_row(EVIL, 8, dtype=EVIL)]
    rows += [row | {"op": EVIL, "kind": EVIL, "bound": EVIL, "model": EVIL} for row in node_rows()[:2]]
    rows += [row | {"op": EVIL} for row in limit_rows()]
    found = parts(*rows, machine=EVIL, commit="{{figures}}")
    assert "b" not in found.tags
    assert found.tags.count("script") == 3
    assert any(EVIL in text for text in found.texts["h1"])
    assert "{{figures}}" in found.texts["dd"]
    assert EVIL in found.texts["td"]
    shown = json.dumps([found.figures[0]["layout"], found.figures[-1]["layout"]])
    assert "<" not in shown.replace("<extra></extra>", "")
    assert "&lt;b onclick" in shown
    for figure in found.figures:
        assert all("onclick" not in trace["hovertemplate"] for trace in figure["data"])
    write_report(tmp_path / "evil.html", content(*rows, machine=EVIL))


@pytest.mark.parametrize("unknown", [None, float("nan"), float("inf"), "many", True])
def test_unknown_values_are_dashes_and_gaps(unknown):
    keys = ("images_per_s", "p20_images_per_s", "p99_ms", "gmacs", "peak_mib", "top1_agreement", "speedup", "params")
    rows: list[dict[str, Any]] = [model_row(runtime, batch) for runtime in CANDIDATES for batch in BATCHES]
    rows[0] = rows[0] | dict.fromkeys(keys, unknown)
    rows += [model_row("engine", 1, 0.5), *node_rows()]
    rows[-1] = rows[-1] | {"us": unknown, "floor_us": unknown, "bound": None, "gmacs": unknown, "shape": None}
    found = parts(*rows)
    assert found.texts["td"].count("-") >= len(keys)
    assert found.figures[0]["data"][0]["y"][0] is None
    assert "166.63 ms in all" in found.texts["h2"][-1]


def test_the_file_refers_to_nothing_outside_it_and_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    write_report(path, full())
    text = path.read_text()
    found = _Parts(text)
    assert [reference for reference in found.references if not reference.startswith("data:")] == []
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None
    assert not re.search(r"url\(|@import", style[1])
    assert os.listdir(tmp_path) == ["r.html"]
    before = path.read_bytes()

    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(InputError, match=r"report: .*No space left"):
        write_report(path, full())
    assert os.listdir(tmp_path) == ["r.html"]
    assert path.read_bytes() == before
