"""The chart and the table of a search by dvit-tune: quality against speed-up."""

from collections.abc import Mapping, Sequence
from typing import Any

from dvit_infer.benchmark.report.figures import SIZE, Chart, figure, plain, titled
from dvit_infer.benchmark.report.tables import Column, number

COLORS = {"evit": "--engine", "tome": "--timm", "predictor": "--onnxruntime", "random": "--reference"}
SYMBOLS = {"evit": "circle", "tome": "diamond", "predictor": "triangle-up", "random": "x"}
POINT_COLUMNS = (
    Column("label", "reduction"),
    Column("name", "options"),
    Column("quality", "quality", lambda value: f"{value:.4f}"),
    Column("low", "95% from", lambda value: f"{value:.4f}"),
    Column("high", "to", lambda value: f"{value:.4f}"),
    Column("images", "images", lambda value: f"{value:,.0f}"),
    Column("macs", "MACs", lambda value: f"{value:.1%}"),
    Column("speedup", "speed-up", lambda value: f"{value:.2f} x"),
    Column("images_per_s", "images/s, measured", lambda value: f"{value:,.1f}"),
)
NOTE = (
    "Each point is a reduction: its quality on the images searched, with the 95% interval, against its speed-up over "
    "the dense model. Filled: timed beside it; open: predicted from MACs. Points that could not meet the target left "
    "early, with few images and wide intervals. The line joins the points to which no other is superior in both."
)


def pareto_chart(tune: Mapping[str, Any]) -> Chart:
    """Chart the points of a search, its front, the target, the dense model and the chosen point."""
    points: Sequence[Mapping[str, Any]] = tune["points"]
    data = [_front(tune, points)]
    data += [
        _markers(method, [point for point in points if point["method"] == method])
        for method in dict.fromkeys(str(point["method"]) for point in points)
    ]
    reach = [value for point in points if (value := number(point["speedup"])) is not None]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "target",
            "x": [min([1.0, *reach]), max([1.0, *reach])],
            "y": [number(tune["target"])] * 2,
            "line": {"color": "--text", "width": 1, "dash": "dot"},
            "hovertemplate": "target: %{y}<extra></extra>",
        }
    )
    data.append(_mark("dense", 1.0, 1.0, "square", "--dense"))
    chosen = tune["chosen"]
    data.append(_mark("chosen" if tune["met"] else "nearest", chosen["speedup"], chosen["quality"], "star", "--text"))
    xaxis = {"title": titled("speed-up over the dense model")}
    yaxis = {"title": titled(f"quality: {tune['metric']}")}
    drawn = figure(data, 480, xaxis, yaxis, showlegend=True)
    return Chart(drawn, "", "quality of every reduction against its speed-up over the dense model")


def _front(tune: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    front = [point for name in tune["pareto"] for point in points if point["name"] == name]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [number(point["speedup"]) for point in front],
        "y": [number(point["quality"]) for point in front],
        "line": {"color": "--dim", "width": 1},
        "hoverinfo": "skip",
    }


def _markers(method: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    color, symbol = COLORS.get(method, "--other"), SYMBOLS.get(method, "hexagon")
    measured = [number(point["images_per_s"]) is not None for point in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(method),
        "x": [number(point["speedup"]) for point in points],
        "y": [number(point["quality"]) for point in points],
        "customdata": [f"{plain(point['label'])}<br>{plain(point['name'])}" for point in points],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [_apart(point, "high") for point in points],
            "arrayminus": [_apart(point, "low") for point in points],
            "thickness": 1,
            "width": 2,
            "color": color,
        },
        "marker": {
            "color": color,
            "size": 9,
            "symbol": [symbol if filled else f"{symbol}-open" for filled in measured],
        },
        "hovertemplate": "%{customdata}<br>%{x:.2f} x, quality %{y:.4f}<extra></extra>",
    }


def _apart(point: Mapping[str, Any], end: str) -> float:
    middle, bound = number(point["quality"]), number(point[end])
    return 0.0 if middle is None or bound is None else abs(bound - middle)


def _mark(name: str, x: object, y: object, symbol: str, color: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": plain(name),
        "x": [number(x)],
        "y": [number(y)],
        "text": [plain(name)],
        "textposition": "bottom center",
        "textfont": {"size": SIZE},
        "marker": {"color": color, "size": 13, "symbol": symbol},
        "hovertemplate": f"{plain(name)}: %{{x:.2f}} x, quality %{{y:.4f}}<extra></extra>",
    }
