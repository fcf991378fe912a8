"""The charts, each drawn from rows alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dvit_infer.benchmark.report.figures import (
    BAR,
    DASHES,
    EDGE,
    SYMBOLS,
    Chart,
    Row,
    Series,
    bars,
    figure,
    plain,
    titled,
)
from dvit_infer.benchmark.report.tables import number

FARTHEST = 4  # longest axis, in longest medians: a p99 beyond it would leave no room for the bars
ARROW = {"symbol": "triangle-right", "size": 11, "color": "--text"}


def throughput(rows: Sequence[Row], series: Mapping[int, Series]) -> list[Chart]:
    """Chart images/s against batch, one line per candidate; with a single batch size, one bar per candidate."""
    batches = sorted({row["batch"] for row in rows})
    if len(batches) == 1:
        data = [
            _bar(place, row["images_per_s"], series[id(row)], "images/s") | {"error_x": _whiskers([row], "--text")}
            for place, row in enumerate(rows)
        ]
        axis = {"title": titled("images/s"), "rangemode": "tozero"}
        drawn = figure(data, EDGE + BAR * len(rows), axis, bars([series[id(row)].label for row in rows]))
        return [Chart(drawn, f"batch {batches[0]}", "images/s of every candidate")]
    lines: dict[Series, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        lines.setdefault(series[id(row)], []).append(row)
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(one.label),
            "x": [row["batch"] for row in line],
            "y": [number(row["images_per_s"]) for row in line],
            "error_y": _whiskers(line, one.color),
            "line": {"color": one.color, "width": 2, "dash": one.dash},
            "marker": {"color": one.color, "symbol": one.symbol, "size": 8},
            "hovertemplate": "%{fullData.name}<br>batch %{x}: %{y:,.1f} images/s<extra></extra>",
        }
        for one, line in lines.items()
    ]
    xaxis = {
        "type": "log",
        "tickvals": batches,
        "ticktext": [str(batch) for batch in batches],
        "title": titled("batch"),
    }
    yaxis = {"title": titled("images/s"), "rangemode": "tozero"}
    drawn = figure(data, 440, xaxis, yaxis, showlegend=True)
    return [Chart(drawn, "", "images/s against batch, one line per candidate")]


def latency(rows: Sequence[Row], series: Mapping[int, Series]) -> list[Chart]:
    """Chart p50 and p99 of every candidate, one chart per batch size because their scales differ."""
    charts = []
    for batch in sorted({row["batch"] for row in rows}):
        those = [row for row in rows if row["batch"] == batch]
        names = [series[id(row)].label for row in those]
        medians, slowest = ([number(row[key]) for row in those] for key in ("p50_ms", "p99_ms"))
        end = max((median for median in medians if median is not None), default=0.0) * FARTHEST
        data = [
            _bar(place, median, series[id(row)], "ms, p50")
            for place, (row, median) in enumerate(zip(those, medians, strict=True))
        ]
        data.append(_ticks([p99 if p99 is None or p99 <= end else None for p99 in slowest], "ms, p99", names))
        axis = {"title": titled("ms a batch"), "rangemode": "tozero", "nticks": 5}
        if beyond := [place for place, p99 in enumerate(slowest) if p99 is not None and p99 > end]:
            arrows = _ticks(
                [end] * len(beyond), "", [f"{names[place]}: {slowest[place]:,.4g} ms, p99" for place in beyond]
            )
            data.append(arrows | {"y": beyond, "marker": ARROW, "hovertemplate": "%{customdata}<extra></extra>"})
            axis |= {"range": [0, end * 1.05]}
        drawn = figure(data, EDGE + BAR * len(those), axis, bars(names))
        charts.append(Chart(drawn, f"batch {batch}", f"p50 and p99 of every candidate at batch {batch}"))
    return charts


def sweeps(rows: Sequence[Row]) -> list[Chart]:
    """Chart images/s of the engine against keep rate, one chart per batch size; [] if there is only one rate."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in ("model", "dtype", "device", "batch")), []).append(row)
    several = {key[:3] for key in groups}
    charts = []
    for key, group in sorted(groups.items(), key=lambda item: item[0][3]):
        engine = sorted((row for row in group if row["runtime"] == "engine"), key=lambda row: row["keep_rate"])
        dense = [row for row in group if row["runtime"] == "dense"][:1]
        if len({row["keep_rate"] for row in engine}) < 2:
            continue
        data = [_swept("engine", engine), *(_swept("dense", [row]) for row in dense)]
        if allowed := _allowed(engine, dense):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": "what MACs allow",
                    "x": [rate for rate, _ in allowed],
                    "y": [value for _, value in allowed],
                    "line": {"color": "--text", "width": 2, "dash": DASHES[2]},
                    "hovertemplate": "MACs allow %{y:,.1f} images/s<extra></extra>",
                }
            )
        rates = [row["keep_rate"] for row in [*engine, *dense]]
        xaxis = {"title": titled("keep rate"), "tickvals": rates, "ticktext": [f"{rate:g}" for rate in rates]}
        yaxis = {"title": titled("images/s"), "rangemode": "tozero"}
        drawn = figure(data, 360, xaxis, yaxis, showlegend=True)
        caption = ", ".join([f"batch {key[3]}", *(map(str, key[:3]) if len(several) > 1 else ())])
        charts.append(Chart(drawn, caption, f"images/s against keep rate, {caption}"))
    return charts


def _swept(runtime: str, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(rows) > 1 else "markers",
        "name": runtime,
        "x": [row["keep_rate"] for row in rows],
        "y": [number(row["images_per_s"]) for row in rows],
        "error_y": _whiskers(rows, f"--{runtime}"),
        "line": {"color": f"--{runtime}", "width": 2},
        "marker": {"color": f"--{runtime}", "symbol": SYMBOLS[runtime], "size": 9},
        "hovertemplate": "%{fullData.name}, keep rate %{x}: %{y:,.1f} images/s<extra></extra>",
    }


def _allowed(engine: Sequence[Row], dense: Sequence[Row]) -> list[tuple[float, float]]:
    """Return (keep rate, images/s) if time depended on MACs alone, scaled from the dense engine; [] if unknown."""
    speed, work = (number(dense[0][key]) if dense else None for key in ("images_per_s", "gmacs"))
    if speed is None or work is None:
        return []
    known = [(row["keep_rate"], number(row["gmacs"])) for row in engine]
    return [(rate, speed * work / gmacs) for rate, gmacs in [*known, (dense[0]["keep_rate"], work)] if gmacs]


def nodes(rows: Sequence[Row]) -> Iterator[tuple[str, Chart, Sequence[Row]]]:
    """Yield for each measured graph a title with sums, a chart of nodes against their floors, and rows for a table."""
    graphs: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        graphs.setdefault(tuple(row.get(key) for key in ("model", "keep_rate", "dtype", "batch")), []).append(row)
    for (model, rate, dtype, batch), graph in graphs.items():
        times = [number(row["us"]) for row in graph]
        floors = [number(row["floor_us"]) for row in graph]
        unit, scale = ("ms", 1e3) if max((t for t in times if t is not None), default=0.0) >= 1e4 else ("µs", 1.0)
        names = [str(row["op"]) for row in graph]
        data: list[dict[str, Any]] = [
            {
                "type": "bar",
                "orientation": "h",
                "name": "time",
                "x": [None if time is None else time / scale for time in times],
                "y": list(range(len(graph))),
                "customdata": [plain(name) for name in names],
                "marker": {"color": "--engine"},
                "hovertemplate": f"%{{customdata}}: %{{x:,.4~g}} {unit}<extra></extra>",
            }
        ]
        for bound in dict.fromkeys(row.get("bound") for row in graph):
            at = [None if row.get("bound") != bound else floor for row, floor in zip(graph, floors, strict=True)]
            shown = [None if floor is None else floor / scale for floor in at]
            mark = _ticks(shown, f"{unit}, floor", names, f"--{'memory' if bound == 'memory' else 'compute'}")
            data.append(mark | {"name": plain(f"floor ({bound})" if bound is not None else "floor")})
        xaxis = {"title": titled(unit), "rangemode": "tozero", "side": "top"}
        drawn = figure(data, EDGE + 30 + 22 * len(graph), xaxis, bars(names), showlegend=True)
        sums = [sum(value for value in column if value is not None) / 1e3 for column in (times, floors)]
        share = f", {sums[1] / sums[0]:.0%} of it" if sums[0] else ""
        title = f"Time per node, batch {batch}: {sums[0]:,.2f} ms in all, floors {sums[1]:,.2f} ms{share}"
        about = [str(model), *([] if number(rate) in (None, 1) else [f"keep {rate:g}"]), str(dtype), f"batch {batch}"]
        ratios = [t / f if t is not None and f else None for t, f in zip(times, floors, strict=True)]
        told = [dict(row) | {"over_floor": ratio} for row, ratio in zip(graph, ratios, strict=True)]
        yield title, Chart(drawn, ", ".join(about), "time of every node as a bar against its floor"), told


def _bar(place: int, value: object, one: Series, unit: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": plain(one.label),
        "x": [number(value)],
        "y": [place],
        "width": [0.7],
        "marker": {"color": one.color},
        "hovertemplate": f"%{{fullData.name}}: %{{x:,.2f}} {unit}<extra></extra>",
    }


def _ticks(values: Sequence[object], unit: str, names: Sequence[str], color: str = "--text") -> dict[str, Any]:
    """Return a vertical tick mark across each bar."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [number(value) for value in values],
        "y": list(range(len(values))),
        "customdata": [plain(name) for name in names],
        "marker": {"symbol": "line-ns", "size": 16, "color": color, "line": {"width": 3, "color": color}},
        "hovertemplate": f"%{{customdata}}: %{{x:,.4~g}} {unit}<extra></extra>",
    }


def _whiskers(rows: Sequence[Row], color: str) -> dict[str, Any]:
    """Return error bars from the 20th to the 80th percentile of images/s."""

    def apart(row: Row, key: str) -> float:
        middle, end = number(row["images_per_s"]), number(row.get(key))
        return 0.0 if middle is None or end is None else abs(end - middle)

    return {
        "type": "data",
        "symmetric": False,
        "array": [apart(row, "p80_images_per_s") for row in rows],
        "arrayminus": [apart(row, "p20_images_per_s") for row in rows],
        "thickness": 1.2,
        "width": 4,
        "color": color,
    }
