"""What the charts share: a way's name and looks, and figures as plotly.js takes them. Colours are names in page.css."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dvit_infer.report.tables import number

Row = Mapping[str, Any]

VARIANTS = ("", "-open", "-open-dot", "-dot")  # of a mark
# A colour and a mark for each `runtime`, the same in every chart and every report; a name that is not here is the last.
SYMBOLS = {
    "engine": "circle",
    "dense": "square",
    "reference": "diamond",
    "compile": "cross",
    "sdpa": "x",
    "timm": "triangle-up",
    "onnxruntime": "triangle-down",
    "openvino": "star",
    "other": "hexagon",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SIZE = 13  # of text, in pixels
BAR, EDGE = 28, 76  # pixels: a bar with its gap; the axis below
LEGEND = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
FLAT: dict[str, Any] = {"fixedrange": True, "gridcolor": "--grid", "zerolinecolor": "--axis", "automargin": True}


@dataclass(frozen=True)
class Way:
    """How a candidate is named and drawn; those of one `runtime` differ in their mark and dash."""

    label: str
    color: str
    symbol: str
    dash: str


@dataclass(frozen=True)
class Chart:
    """A figure {"data": [...], "layout": {...}}, a caption above it ("" for none), and its name for who cannot see."""

    figure: dict[str, Any]
    caption: str
    label: str


def label_ways(rows: Sequence[Row]) -> dict[int, Way]:
    """The way of each model row, by the row's id(): its runtime, variant, keep rate, and what else sets rows apart."""
    apart = [key for key in ("model", "dtype", "device") if len({row.get(key) for row in rows}) > 1]
    ways: dict[tuple[Any, ...], Way] = {}
    seen: dict[str, int] = {}
    found = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("runtime", "variant", "keep_rate", *apart))
        if key not in ways:
            runtime, rate = str(row.get("runtime")), number(row.get("keep_rate"))
            name = runtime if row.get("variant") is None else f"{runtime} ({row['variant']})"
            kept = [] if rate is None or rate == 1 else [f"keep {rate:g}"]
            label = ", ".join([name, *kept, *(str(row.get(key)) for key in apart)])
            style = runtime if runtime in SYMBOLS else "other"
            nth = seen[style] = seen.get(style, -1) + 1
            mark = SYMBOLS[style] + VARIANTS[nth % len(VARIANTS)]
            ways[key] = Way(label, f"--{style}", mark, DASHES[nth % len(DASHES)])
        found[id(row)] = ways[key]
    return found


def plain(text: object) -> str:
    """Text that plotly shows as it is: it takes <b> and the like for markup, and entities for what they stand for."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def titled(text: str) -> dict[str, Any]:
    """An axis's title, no larger than its numbers."""
    return {"text": text, "font": {"size": SIZE}}


def figure(data: Iterable[Mapping[str, Any]], height: int, xaxis: Row, yaxis: Row, **layout: Any) -> dict[str, Any]:
    """A figure in the page's dress: no title, and no zooming, which would catch a finger that scrolls."""
    dress = {
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
    return {"data": [dict(trace) for trace in data], "layout": dress | layout}


def bars(labels: Sequence[str]) -> dict[str, Any]:
    """The axis of a row of horizontal bars, first on top. Positions are numbers: two of one name stay two."""
    return {
        "tickvals": list(range(len(labels))),
        "ticktext": [plain(label) for label in labels],
        "range": [len(labels) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
    }
