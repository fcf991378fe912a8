"""Parts that the charts share: series with labels and styles, and plotly.js figures. page.css defines the colours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dvit_infer.benchmark.report.tables import number

Row = Mapping[str, Any]

VARIANTS = ("", "-open", "-open-dot", "-dot")  # suffixes of a marker symbol
# Each `runtime` has a colour and a marker, the same in every chart and report; an unknown runtime takes the last.
SYMBOLS = {
    "engine": "circle",
    "dense": "square",
    "reference": "diamond",
    "compile": "cross",
    "sdpa": "x",
    "timm": "triangle-up",
    "transformers": "pentagon",
    "onnxruntime": "triangle-down",
    "openvino": "star",
    "other": "hexagon",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SIZE = 13  # font size in pixels
BAR, EDGE = 28, 76  # pixels: a bar with its gap; the axis below
LEGEND = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
FLAT: dict[str, Any] = {"fixedrange": True, "gridcolor": "--grid", "zerolinecolor": "--axis", "automargin": True}


@dataclass(frozen=True)
class Series:
    """A candidate's label and style. Candidates of one `runtime` differ in marker and dash."""

    label: str
    color: str
    symbol: str
    dash: str


@dataclass(frozen=True)
class Chart:
    """A figure {"data": [...], "layout": {...}}, a caption above it ("" for none), and a label for screen readers."""

    figure: dict[str, Any]
    caption: str
    label: str


def label_candidates(rows: Sequence[Row]) -> dict[int, Series]:
    """Return the series of each model row, by the row's id().

    Its label names the runtime, variant, keep rate, and any other field in which rows differ.
    """
    apart = [key for key in ("model", "dtype", "device") if len({row.get(key) for row in rows}) > 1]
    series: dict[tuple[Any, ...], Series] = {}
    seen: dict[str, int] = {}
    found = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("runtime", "variant", "keep_rate", *apart))
        if key not in series:
            runtime, rate = str(row.get("runtime")), number(row.get("keep_rate"))
            name = runtime if row.get("variant") is None else f"{runtime} ({row['variant']})"
            kept = [] if rate is None or rate == 1 else [f"keep {rate:.3g}"]
            label = ", ".join([name, *kept, *(str(row.get(key)) for key in apart)])
            style = runtime if runtime in SYMBOLS else "other"
            nth = seen[style] = seen.get(style, -1) + 1
            mark = SYMBOLS[style] + VARIANTS[nth % len(VARIANTS)]
            series[key] = Series(label, f"--{style}", mark, DASHES[nth % len(DASHES)])
        found[id(row)] = series[key]
    return found


def plain(text: object) -> str:
    """Escape text that plotly is to show verbatim; it interprets tags such as <b>, and entities."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def titled(text: str) -> dict[str, Any]:
    """Return an axis title in the font size of the tick labels."""
    return {"text": text, "font": {"size": SIZE}}


def figure(data: Iterable[Mapping[str, Any]], height: int, xaxis: Row, yaxis: Row, **layout: Any) -> dict[str, Any]:
    """Return a figure in the page's style: without title, and without zooming, which would interfere with scrolling."""
    style = {
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8, "pad": 4},
        "font": {"family": "system-ui, sans-serif", "size": SIZE, "color": "--text"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "--card", "font": {"color": "--text"}},
        "dragmode": False,
        "showlegend": False,
        "legend": LEGEND,
        "xaxis": FLAT | dict(xaxis),
        "yaxis": FLAT | dict(yaxis),
    }
    return {"data": [dict(trace) for trace in data], "layout": style | layout}


def bars(labels: Sequence[str]) -> dict[str, Any]:
    """Return the axis of horizontal bars, the first on top. Positions are numbers, so equal labels stay separate."""
    return {
        "tickvals": list(range(len(labels))),
        "ticktext": [plain(label) for label in labels],
        "range": [len(labels) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
    }
