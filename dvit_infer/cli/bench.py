"""dvit-bench: reference, dense engine, pruned engine and their peers side by side in one run; where the time goes."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, integers, progress, run

if TYPE_CHECKING:
    from dvit_infer.compare import Comparison, Gain, Outcome
    from dvit_infer.node_times import NodeTime
    from dvit_infer.timing import Row

SECONDS = 12.0  # of measuring at every batch size


def _parser() -> Parser:
    parser = Parser(
        prog="dvit-bench", description="Measure a model: images/s, latency, multiply-adds, speed-up, error."
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="saved file or checkpoint; default: a random DeiT-S/0.7"
    )
    parser.add_argument("--batch", type=integers, metavar="256[,1,...]", help="default: 256 on CUDA, 8 on a CPU")
    parser.add_argument("--device", metavar="D", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", metavar="T", help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument(
        "--compare",
        metavar="NAME[,NAME...]",
        help="of reference, dense, compile, sdpa, onnxruntime, openvino, timm; the first is the baseline of the "
        "speed-ups; default: reference,dense",
    )
    parser.add_argument("--sweep", type=_rates, metavar="0.5:0.9:0.1", help="measure keep rates: first, last, step")
    parser.add_argument("--nodes", action="store_true", help="time every node of the graph against its floor")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="to measure each batch size; default: %(default)g"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with tables and charts")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _bench, argv)


def _bench(options: argparse.Namespace) -> int:
    from dvit_infer.compare import USUAL, Comparison
    from dvit_infer.errors import InputError
    from dvit_infer.files import check_output
    from dvit_infer.node_times import limit_rows, measure_limits
    from dvit_infer.node_times import rows as node_rows
    from dvit_infer.results import environment, write_json

    outs = {
        what: check_output(name, what, not_this=options.model)
        for what, name in (("json", options.json), ("report", options.report))
        if name is not None
    }
    if len(set(outs.values())) < len(outs):
        raise InputError(f"report: {options.report} is where the JSON goes; choose another name")
    if wrong := [batch for batch in options.batch or () if not 1 <= batch <= 1 << 24]:
        raise InputError(f"batch: {wrong[0]} pictures cannot be measured; 1 or more can")
    if not 0 <= options.seconds <= 86400:
        raise InputError(f"seconds: {options.seconds:g}; 0 to 86400 can be measured")
    with progress("loading"):
        names = options.compare.split(",") if options.compare is not None else USUAL
        comparison = Comparison(options.model, names, options.device, options.dtype, options.sweep or ())
    where = environment()
    limits = None
    if options.nodes:
        with progress("measuring this machine"):
            limits = measure_limits(comparison.device, comparison.subject.dtype)
    outcomes: dict[int, Outcome] = {}
    nodes: dict[int, list[NodeTime]] = {}
    for batch in dict.fromkeys(options.batch or (256 if comparison.device.type == "cuda" else 8,)):
        with progress(f"batch {batch}") as show:
            outcomes[batch] = comparison.measure(batch, options.seconds, show)
        if limits is not None:
            with progress(f"nodes, batch {batch}") as show:
                nodes[batch] = comparison.time_nodes(batch, limits, options.seconds, show)
    rows: list[dict[str, Any]] = [asdict(row) for outcome in outcomes.values() for row in outcome.rows]
    for batch, times in nodes.items():
        rows += node_rows(times, comparison.engine, batch)
    rows += [] if limits is None else limit_rows(limits, comparison.subject.dtype)

    _print_rows(comparison, outcomes, where)
    for batch, times in nodes.items():
        print(_node_table(times, batch))
        print(f"batch {batch}: {_by_kind(times)}")
    if limits is not None:
        print(limits)
    content = {"environment": where, "rows": rows}
    if "json" in outs:
        write_json(outs["json"], content)
        print(f"wrote {options.json}")
    if "report" in outs:
        from dvit_infer.report import write_report

        write_report(outs["report"], content)
        print(f"wrote {options.report}")
    if strays := [f"batch {batch}: {stray}" for batch, outcome in outcomes.items() for stray in outcome.strays]:
        print(f"error: not all ways compute the same function: {'; '.join(strays)}", file=sys.stderr)
        return 1
    return 0


def _print_rows(comparison: "Comparison", outcomes: "Mapping[int, Outcome]", where: "Mapping[str, str | None]") -> None:
    from dvit_infer.compare import fvcore_gflops

    config = comparison.config
    stages = ",".join(map(str, config.num_keep)) or "all"
    print(f"{config.arch}, keeping {stages} of {config.num_patches} patches; {comparison.subject.dtype_name} ", end="")
    print(f"on {where['machine']}, torch {where['torch']}; speed-up over {comparison.baseline}")
    print(_table([row for outcome in outcomes.values() for row in outcome.rows]))
    counted = fvcore_gflops(comparison.reference, comparison.images(1).to(comparison.device))
    if counted is not None:
        print(f"the reference has {counted:.3f} x 10^9 multiply-adds by fvcore's count")
    sweeps = any(len(outcome.gains) > 1 for outcome in outcomes.values())
    for batch, outcome in outcomes.items():
        if sweeps:
            print(_sweep_table(outcome.gains, batch))
        lines = [str(gain) for gain in outcome.gains if not sweeps]
        for line in filter(None, (*lines, outcome.verdict, outcome.noise)):
            print(f"batch {batch}: {line}")


def _table(rows: "Sequence[Row]") -> str:
    from dvit_infer.tables import table

    columns = (
        *(">batch", "how", ">keep rate", ">images/s", ">p20", ">p80", ">p50 ms", ">p99 ms", ">10^9 madds"),
        *(">speed-up", ">peak MiB", ">max error", ">top-1"),
    )
    cells = [
        (
            str(row.batch),
            row.how if row.mode is None else f"{row.how} ({row.mode})",
            f"{row.keep_rate:g}",
            f"{row.images_per_s:.1f}",
            f"{row.p20_images_per_s:.1f}",
            f"{row.p80_images_per_s:.1f}",
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}",
            f"{row.gflops:.3f}",
            f"{row.speedup:.2f} x",
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            f"{row.max_logit_error:.1e}",
            f"{row.top1_agreement:.1%}",
        )
        for row in rows
    ]
    return table(columns, cells)


def _sweep_table(gains: "Sequence[Gain]", batch: int) -> str:
    from dvit_infer.tables import table

    columns = ("keep rate", "patches kept", ">10^9 madds", ">images/s", ">over dense", ">allowed", ">realised")
    cells = [
        (
            f"{gain.keep_rate:g}",
            ",".join(map(str, gain.num_keep)),
            f"{gain.gflops:.3f}",
            f"{gain.images_per_s:.1f}",
            f"{gain.speedup:.3f} x",
            f"{gain.ceiling:.3f} x",
            f"{gain.speedup / gain.ceiling:.1%}",
        )
        for gain in gains
    ]
    return table(columns, cells, title=f"batch {batch}: pruned over dense engine, and what the multiply-adds allow")


def _node_table(times: "Sequence[NodeTime]", batch: int) -> str:
    from dvit_infer.tables import table

    total, floor = sum(t.seconds for t in times), sum(t.floor_s for t in times)

    def cells(name: str, kind: str, t: "NodeTime | None", seconds: float, floor_s: float) -> tuple[str, ...]:
        gflops, moved = (sum(getattr(each, what) for each in ([t] if t else times)) for what in _SUMS)
        return (
            *(name, kind, f"{gflops:.3f}", f"{moved / 2**20:.1f}", f"{floor_s * 1e6:.0f}", t.bound if t else ""),
            *(f"{seconds * 1e6:.0f}", f"{floor_s / seconds:.0%}", f"{seconds / total:.1%}"),
            "-" if t is None or t.max_error is None else f"{t.max_error:.1e}",
        )

    columns = (
        *("node", "kind", ">10^9 madds", ">MiB", ">floor us", "bound by", ">us", ">of its floor", ">share"),
        ">max error",
    )
    rows = [cells(t.node.name, t.node.kind, t, t.seconds, t.floor_s) for t in times]
    title = f"batch {batch}: time of every node, and the least that this machine could take"
    return table(columns, rows, title=title, total=cells("total", "", None, total, floor))


_SUMS = ("gflops", "bytes_moved")


def _by_kind(times: "Sequence[NodeTime]") -> str:
    """The kinds of nodes, the one that takes longest first: its share of the time, and of that its floor."""
    spent: dict[str, float] = {}
    floor: dict[str, float] = {}
    for t in times:
        spent[t.node.kind] = spent.get(t.node.kind, 0.0) + t.seconds
        floor[t.node.kind] = floor.get(t.node.kind, 0.0) + t.floor_s
    total = sum(spent.values())
    kinds = sorted(spent, key=lambda kind: -spent[kind])
    return "; ".join(
        f"{kind} {spent[kind] / total:.1%} of the time, {floor[kind] / spent[kind]:.0%} of it its floor"
        for kind in kinds
    )


def _rates(text: str) -> tuple[float, ...]:
    """'0.5:0.9:0.1' -> (0.5, 0.6, 0.7, 0.8, 0.9)."""
    try:
        first, last, step = (float(part) for part in text.split(":"))
        count = math.floor((last - first) / step + 1e-9) + 1
        if not (0 < first <= last <= 1 and step > 0 and count <= 100):
            raise ValueError
    except (ValueError, OverflowError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text!r} are no keep rates such as 0.5:0.9:0.1: first and last above 0, at most 1, and a step"
        ) from None
    return tuple(round(first + i * step, 9) for i in range(count))


if __name__ == "__main__":
    sys.exit(main())
