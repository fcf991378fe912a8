"""Sortable HTML tables, and the columns of a result file. A cell holds its sort key beside its text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Column:
    """A key of a row, its heading, and the format of its numbers (None: the column is text)."""

    key: str
    heading: str
    show: Callable[[float], str] | None = None


def _digits(places: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{places}f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _error(value: float) -> str:
    return f"{value:.1e}"


def _times(value: float) -> str:
    return f"{value:.2f} x"


MODEL_COLUMNS = (
    Column("batch", "batch", _digits(0)),
    Column("images_per_s", "images/s", _digits(1)),
    Column("speedup", "speed-up", _times),
    Column("baseline", "over"),
    Column("max_logit_error", "max error", _error),
    Column("top1_agreement", "top-1 agreement", _percent),
    Column("p50_ms", "p50 ms", _digits(2)),
    Column("p99_ms", "p99 ms", _digits(2)),
    Column("p20_images_per_s", "p20 images/s", _digits(1)),
    Column("p80_images_per_s", "p80 images/s", _digits(1)),
    Column("gmacs", "GMACs", _digits(3)),
    Column("params", "10⁶ weights", lambda value: f"{value / 1e6:,.2f}"),
    Column("peak_mib", "peak MiB", _digits(0)),
)
NODE_COLUMNS = (
    Column("op", "node"),
    Column("kind", "kind"),
    Column("shape", "shape"),
    Column("us", "µs", _digits(1)),
    Column("share", "share", _percent),
    Column("saves_us", "saves µs", _digits(1)),
    Column("floor_us", "floor µs", _digits(1)),
    Column("over_floor", "time over floor", _times),
    Column("bound", "bound by"),
    Column("gmacs", "GMACs", _digits(3)),
    Column("mib", "MiB moved", _digits(2)),
    Column("max_error", "max error", _error),
)
LIMIT_COLUMNS = (
    Column("op", "op"),
    Column("runtime", "runtime"),
    Column("dtype", "dtype"),
    Column("batch", "batch", _digits(0)),
    Column("shape", "shape"),
    Column("us", "µs", _digits(1)),
    Column("tflops", "TFLOP/s", _digits(3)),
    Column("gb_per_s", "GB/s", _digits(1)),
    Column("max_error", "max error", _error),
)


def number(value: object) -> float | None:
    """Return the value if it is a finite number, else None; result files hold null for unknown values."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def table(
    name: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None
) -> str:
    """Return an HTML table in a scrollable box; `labels`, if given, fill a first column "runtime"."""
    headings = [*(["runtime"] if labels is not None else []), *(column.heading for column in columns)]
    texts = [*([True] if labels is not None else []), *(column.show is None for column in columns)]
    head = "".join(
        f'<th scope="col"{"" if text else _RIGHT}><button type="button">{escape(heading)}</button></th>'
        for heading, text in zip(headings, texts, strict=True)
    )
    body = []
    for index, row in enumerate(rows):
        first = [f"<td>{escape(labels[index])}</td>"] if labels is not None else []
        body.append(f"<tr>{''.join([*first, *(_cell(column, row.get(column.key)) for column in columns)])}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(body)}</tbody></table></div>\n"
    )


_RIGHT = ' class="number"'


def _cell(column: Column, value: object) -> str:
    if column.show is None:
        return f"<td>{escape(_text(value))}</td>"
    found = number(value)
    if found is None:
        return f"<td{_RIGHT}>-</td>"
    return f'<td{_RIGHT} data-value="{found!r}">{escape(column.show(found))}</td>'


def _text(value: object) -> str:
    """Format [[1, 197, 384], [1, 197, 384]] as 1x197x384 → 1x197x384."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        nested = any(isinstance(part, list | tuple) for part in value)
        return (" → " if nested else "x").join(_text(part) for part in value)
    return str(value)
