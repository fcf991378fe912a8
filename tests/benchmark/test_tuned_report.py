"""The chart of quality against speed in a report."""

import json
import re

import plotly.graph_objects as go
from report_content import content

from dvit_infer.benchmark.report.page import page
from dvit_infer.benchmark.report.tuned import pareto_chart

POINT = {"quality": 0.99, "low": 0.97, "high": 1.0, "images": 200, "macs": 0.7, "meets": True, "settings": {}}


def point(name, method, speedup, **more):
    return {**POINT, "name": name, "label": f"{method} <b>", "method": method, "speedup": speedup, **more}


POINTS = [
    point("--method evit", "evit", 1.4, images_per_s=100.0),
    point("--method tome", "tome", 1.2, images_per_s=None, quality=0.995),
    point("--method other", "other", 2.0, images_per_s=None, quality=0.5, low=None, high=None),
]
TUNE = {
    "metric": "agreement",
    "target": 0.99,
    "met": True,
    "chosen": POINTS[0],
    "pareto": ["--method evit", "--method tome"],
    "points": POINTS,
    "won": "evit 0.7: <i>faster</i>",
}


def test_the_chart_of_a_search():
    chart = pareto_chart(TUNE)
    traces = {trace["name"]: trace for trace in chart.figure["data"]}
    assert list(traces) == ["front", "evit", "tome", "other", "target", "dense", "chosen"]
    assert traces["front"]["x"] == [1.4, 1.2]
    assert traces["evit"]["marker"]["symbol"] == ["circle"]  # timed
    assert traces["tome"]["marker"]["symbol"] == ["diamond-open"]  # predicted
    assert traces["other"]["error_y"]["array"] == [0.0]
    assert traces["target"]["y"] == [0.99, 0.99]
    assert (traces["chosen"]["x"], traces["chosen"]["y"]) == ([1.4], [0.99])
    go.Figure(json.loads(re.sub(r'"--[a-z]+"', '"#123456"', json.dumps(chart.figure))))


def test_one_that_met_no_target_names_the_nearest():
    traces = [trace["name"] for trace in pareto_chart({**TUNE, "met": False}).figure["data"]]
    assert traces[-1] == "nearest"


def test_the_page_begins_with_it_and_escapes_what_it_shows():
    text = page({**content(), "tune": TUNE})
    assert "<h2>Quality against speed</h2>" in text
    assert "evit 0.7: &lt;i&gt;faster&lt;/i&gt;" in text
    assert "<b>" not in text.split("<script")[0].replace("<body>", "")
