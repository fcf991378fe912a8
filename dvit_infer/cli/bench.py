"""dvit-bench: measure reference, dense engine, pruned engine and peers in one run, and the time of every node."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, add_model_options, integers, progress, run

if TYPE_CHECKING:
    from dvit_infer.benchmark.outcome import Outcome
    from dvit_infer.benchmark.roofline import NodeTime

FACTS = ("arch", "method", "keep_rate", "prune_at", "merge", "image_size", "assume")  # options that say what it is
SECONDS = 12.0  # measuring time for each batch size


def _parser() -> Parser:
    parser = Parser(prog="dvit-bench", description="Measure a model: images/s, latency, MACs, speed-up, error.")
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="saved file, checkpoint or ONNX file; default: a random DeiT-S/0.7"
    )
    parser.add_argument("--batch", type=integers, metavar="256[,1,...]", help="default: 256 on CUDA, 8 on a CPU")
    add_model_options(parser)
    parser.add_argument(
        "--compare",
        metavar="NAME[,NAME...]",
        help="any of reference, dense, compile, sdpa, onnxruntime, onnx, onnx-int8, openvino, timm, timm-compile, "
        "transformers, transformers-compile; the first is the baseline of speed-ups; default: reference,dense; for an "
        "ONNX file: any of onnxruntime, openvino",
    )
    sweep = "measure keep rates: first, last, step"
    parser.add_argument("--sweep", type=_rates, metavar="0.5:0.9:0.1", help=sweep)
    parser.add_argument("--nodes", action="store_true", help="time every node of the graph against its floor")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="measuring time per batch size; default: %(default)g"
    )
    parser.add_argument(
        "--load", type=int, default=0, metavar="N", help="keep N other processes busy while the candidates are timed"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with tables and charts")
    parser.add_argument(
        "--environment", action="store_true", help="print what a bug report needs, and measure nothing: no MODEL"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _bench, argv)


def _bench(options: argparse.Namespace) -> int:
    if options.environment:
        return _environment()
    from dvit_infer.backends.openvino import OpenVinoRunner
    from dvit_infer.benchmark.compare import USUAL, Comparison, fvcore_gmacs
    from dvit_infer.benchmark.compare_onnx import OnnxComparison
    from dvit_infer.benchmark.load import check_load
    from dvit_infer.benchmark.results import VERSION, environment, write_json
    from dvit_infer.benchmark.roofline import limit_rows, measure_limits
    from dvit_infer.benchmark.roofline import rows as node_rows
    from dvit_infer.cli.bench_tables import heading, report_of
    from dvit_infer.errors import InputError
    from dvit_infer.onnx.engine import is_onnx
    from dvit_infer.utils.bounds import check_bound
    from dvit_infer.utils.files import check_output

    outs = {
        what: check_output(name, what, not_this=options.model)
        for what, name in (("json", options.json), ("report", options.report))
        if name is not None
    }
    if len(set(outs.values())) < len(outs):
        raise InputError(f"report: {options.report} is also the JSON file; choose another name")
    for batch in options.batch or ():
        check_bound("batch", batch, 1 << 24)
        if batch < 1:
            raise InputError(f"batch: {batch} images cannot be measured; 1 or more can")
    if not 0 <= options.seconds <= 86400:
        raise InputError(f"seconds: {options.seconds:g}; 0 to 86400 can be measured")
    check_load(options.load)
    if options.sweep and options.keep_rate is not None:
        raise InputError("sweep: it measures keep rates, so --keep-rate has to be left out")
    batches = list(dict.fromkeys(options.batch or ()))
    names = options.compare.split(",") if options.compare is not None else None
    counted = limits = None
    comparison: Comparison | OnnxComparison
    with progress("loading"):
        if is_onnx(options.model):
            if options.backend is not None:
                raise InputError(f"backend: {options.model} runs in what --compare names; the checkpoint has a choice")
            fixed = ("dtype", "calibrate", "sweep", "nodes", *FACTS)
            values = {name: getattr(options, name) for name in fixed}
            if odd := [name for name, value in values.items() if value is not None and value is not False]:
                raise InputError(
                    f"{odd[0]}: {options.model} was converted with this fixed; give the checkpoint instead"
                )
            comparison = OnnxComparison(options.model, names or (), options.device)
        else:
            given = USUAL if names is None else names
            comparison = Comparison(
                options.model,
                given,
                options.device,
                options.dtype,
                options.sweep or (),
                calibrate=options.calibrate,
                backend=options.backend,
                facts={name: getattr(options, name) for name in FACTS},
            )
            counted = fvcore_gmacs(comparison.reference, comparison.images(1).to(comparison.device))
            limits = measure_limits(comparison.device, comparison.subject.dtype) if options.nodes else None
        batches = batches or [comparison.fixed_batch or (256 if comparison.device.type == "cuda" else 8)]
        comparison.check_memory(max(batches))
    where = environment()
    print(heading(comparison, where, options.load))
    if counted is not None:
        print(f"the reference has {counted:.3f} GMACs by fvcore's count")
    outcomes: dict[int, Outcome] = {}
    nodes: dict[int, list[NodeTime]] = {}
    try:
        for batch in batches:
            with progress(f"batch {batch}") as show:
                outcomes[batch] = comparison.measure(batch, options.seconds, show, options.load)
            if limits is not None and isinstance(comparison, Comparison):
                with progress(f"nodes, batch {batch}") as show:
                    nodes[batch] = comparison.time_nodes(batch, limits, options.seconds, show)
    finally:  # also after an interrupt, or if a later batch does not fit in memory
        if outcomes:
            print(report_of(outcomes, nodes))
    # Rows without load, and of predictors, are as they were before there was another.
    beside: dict[str, Any] = {"load": options.load} if options.load else {}
    if isinstance(comparison, Comparison) and comparison.config.reduction.method not in ("none", "predictor"):
        beside["method"] = comparison.config.reduction.method
    rows: list[dict[str, Any]] = [asdict(row) | beside for outcome in outcomes.values() for row in outcome.rows]
    if limits is not None and isinstance(comparison, Comparison):
        for batch, times in nodes.items():
            rows += node_rows(times, comparison.engine, batch)
        rows += limit_rows(limits, comparison.subject.dtype)
        print(limits)
        if isinstance(comparison.engine.runner, OpenVinoRunner):
            print("nodes: run one by one in PyTorch; OpenVINO runs all of them in one")
    content = {"version": VERSION, "environment": where, "rows": rows}
    if "json" in outs:
        write_json(outs["json"], content)
        print(f"wrote {options.json}")
    if "report" in outs:
        from dvit_infer.benchmark.report.page import write_report

        write_report(outs["report"], content)
        print(f"wrote {options.report}")
    if mismatches := [
        f"batch {batch}: {mismatch}" for batch, outcome in outcomes.items() for mismatch in outcome.mismatches
    ]:
        print(f"error: not all candidates compute the same function: {'; '.join(mismatches)}", file=sys.stderr)
        return 1
    return 0


def _environment() -> int:
    from dvit_infer.benchmark.environment import describe_environment

    print(describe_environment())
    return 0


def _rates(text: str) -> tuple[float, ...]:
    """Parse '0.5:0.9:0.1' to (0.5, 0.6, 0.7, 0.8, 0.9)."""
    try:
        first, last, step = (float(part) for part in text.split(":"))
        count = math.floor((last - first) / step + 1e-9) + 1
        if not (0 < first <= last <= 1 and step > 0 and count <= 100):
            raise ValueError
    except (ValueError, OverflowError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a range of keep rates such as 0.5:0.9:0.1: first, last (above 0, at most 1), step"
        ) from None
    return tuple(round(first + i * step, 9) for i in range(count))


if __name__ == "__main__":
    sys.exit(main())
