"""Show a result file as one HTML page with tables and charts, which needs no network."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dvit_infer.benchmark.load import describe_load
from dvit_infer.benchmark.report.charts import latency, nodes, sweeps, throughput
from dvit_infer.benchmark.report.figures import Chart, label_candidates
from dvit_infer.benchmark.report.tables import LIMIT_COLUMNS, MODEL_COLUMNS, NODE_COLUMNS, table
from dvit_infer.benchmark.report.tuned import NOTE, POINT_COLUMNS, pareto_chart
from dvit_infer.benchmark.results import as_version_2
from dvit_infer.utils.files import atomic_write

HERE = Path(__file__).parent


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page atomically.

    Args:
        path: the output path, checked by `files.check_output`.
        content: a result file as `dvit-bench --json` writes it, of version 1 or 2. Model rows become a table of speed
            and accuracy, images/s against batch, latency and, with several keep rates, their sweep. Rows with "op" and
            "floor_us" become the time of each node of the graph. Other op rows become a table for each kind. The part
            "tune" of a file of `dvit-tune` becomes a chart of quality against speed and a table of points.

    Raises:
        InputError: The content is not a result file or of another version, or writing failed (a full disk).
    """
    text = page(content)
    with atomic_write(path, "report") as part:
        part.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate in a file name has no UTF-8 form


def page(content: Mapping[str, Any]) -> str:
    """Return a result file as HTML. All content is escaped."""
    from plotly.offline import get_plotlyjs

    content = as_version_2(content, "report")
    environment: Mapping[str, Any] = content["environment"]
    models = [row for row in content["rows"] if "op" not in row]
    ops = [row for row in content["rows"] if "op" in row]
    graph = [row for row in ops if "floor_us" in row]
    other = [row for row in ops if "floor_us" not in row]
    limits = [row for row in other if str(row.get("runtime")).startswith("measured")]
    single = [row for row in other if row not in limits]

    figures: list[dict[str, Any]] = []
    subjects = [*models, *graph] or ops
    parts = [_header(environment, subjects)]
    if tuned := content.get("tune"):
        body = f"<p><strong>{escape(str(tuned['won']))}</strong></p>\n" + _drawn([pareto_chart(tuned)], figures)
        body += table("points", POINT_COLUMNS, tuned["points"])
        parts.append(_section("Quality against speed", NOTE, body))
    if models:
        series = label_candidates(models)
        labels = [series[id(row)].label for row in models]
        note = (
            "Max error and top-1 agreement are against the plain model in float32, for dense rows the dense one. "
            "A click on a heading sorts."
        )
        parts.append(_section("Speed and accuracy", note, table("speed and accuracy", MODEL_COLUMNS, models, labels)))
        note = "Medians; whiskers from the 20th to the 80th percentile."
        title = "Images/s against batch" if len({row["batch"] for row in models}) > 1 else "Images/s"
        parts.append(_section(title, note, _drawn(throughput(models, series), figures)))
        note = (
            "Milliseconds for a batch: the bar is the median (p50), the tick is p99; an arrow, p99 far beyond the axis."
        )
        parts.append(_section("Latency", note, _drawn(latency(models, series), figures)))
        if swept := sweeps(models):
            note = "Dotted: what MACs allow, images/s of the dense engine times its MACs over those at the keep rate."
            parts.append(_section("Keep-rate sweep", note, _drawn(swept, figures)))
    for title, chart, rows in nodes(graph):
        note = (
            "Bars: time of each node, in the order of the graph. Ticks: its floor, its MACs or its bytes "
            "at the measured limits of this machine, as if caches kept nothing: a floor by memory can be gone below."
        )
        body = _drawn([chart], figures) + table(title, NODE_COLUMNS, rows)
        parts.append(_section(title, note, body))
    for title, rows in (("Measured limits of this machine", limits), ("Single ops", single)):
        if rows:
            columns = [column for column in LIMIT_COLUMNS if any(row.get(column.key) is not None for row in rows)]
            parts.append(_section(title, "", table(title.lower(), columns, rows)))
    if not content["rows"]:
        parts.append("<p>There are no rows.</p>")

    fields = {
        "title": escape(_title(subjects, environment)),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "body": "\n".join(parts),
        # `<` could end the script element or begin a comment in it.
        "figures": json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
        "plotly": get_plotlyjs() if figures else "",
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
    }
    # One pass: text inside a field is never taken for the name of another field.
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], template)


def _title(rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    what = _distinct(rows, "model") or "dvit-bench"
    machine = environment.get("gpu") or environment.get("machine")
    load = _distinct(rows, "load")
    return (f"{what} on {machine}" if machine else what) + (f", {describe_load(load)}" if load else "")


def _header(environment: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    facts = {key: _distinct(rows, key) for key in ("model", "dtype")} | dict(environment)
    shown = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in facts.items()
        if value not in (None, "")
    )
    return f"<header><h1>{escape(_title(rows, environment))}</h1>\n<dl>{shown}</dl></header>"


def _distinct(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None))


def _section(title: str, note: str, body: str) -> str:
    said = f"<p>{escape(note)}</p>\n" if note else ""
    return f"<section><h2>{escape(title)}</h2>\n{said}{body}</section>"


def _drawn(charts: Sequence[Chart], figures: list[dict[str, Any]]) -> str:
    """Return placeholders for charts, side by side if space allows; append their figures to `figures` in order."""
    figures.extend(chart.figure for chart in charts)
    places = [
        (f"<figcaption>{escape(chart.caption)}</figcaption>" if chart.caption else "")
        + f'<div class="chart" role="img" aria-label="{escape(chart.label)}"'
        + f' style="height:{chart.figure["layout"]["height"]}px"></div>'
        for chart in charts
    ]
    figure = "".join(f"<figure>{place}</figure>" for place in places)
    return f'<div class="charts">{figure}</div>\n'
