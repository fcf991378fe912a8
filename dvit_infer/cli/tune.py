"""dvit-tune: find the fastest reduction that keeps a model's answers, on this machine and on a folder of images."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from dvit_infer.cli.common import Parser, add_model_options, check_interrupt, run
from dvit_infer.cli.images import shown, warn

if TYPE_CHECKING:
    from dvit_infer.tuning.result import TunedPoint, TuneResult

LISTED = 12  # points of the table


def _parser() -> Parser:
    parser = Parser(
        prog="dvit-tune",
        description="Find the fastest reduction that keeps a model's answers on your images, measured on this machine.",
    )
    parser.add_argument("model", metavar="MODEL", help="saved file or checkpoint")
    parser.add_argument("folder", metavar="FOLDER", help="images at any depth; for --metric top1 one folder per class")
    parser.add_argument("--target", type=float, default=0.99, metavar="Q", help="quality to keep; default: %(default)g")
    parser.add_argument(
        "--metric",
        metavar="M",
        help="agreement: share of images that get the dense model's class; cosine: of features with the dense model's, "
        "on average; top1: share of its top-1 accuracy; default: agreement, without classifier cosine",
    )
    parser.add_argument("--methods", metavar="M[,M...]", help="any of evit, tome, predictor; default: those that fit")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="time that it may take; default: 720")
    parser.add_argument("-o", "--out", metavar="OUT", help="default: <stem>.dvit.safetensors here")
    parser.add_argument("--batch", type=int, metavar="B", help="images at a time; default: 256 on CUDA, 16 on a CPU")
    add_model_options(parser, "arch", "device", "dtype", "calibrate", "backend", "image-size", "assume")
    parser.add_argument(
        "--labels", metavar="FILE", help="top1: the class of each image: CSV (file, class), or one a line"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode; default: one less than CPUs")
    parser.add_argument("--json", metavar="FILE", help="write all points as JSON")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with the chart of quality against speed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _tune, argv)


def _tune(options: argparse.Namespace) -> int:
    from dvit_infer.benchmark.results import environment, write_json
    from dvit_infer.cli.convert import default_out
    from dvit_infer.errors import InputError
    from dvit_infer.tuning.tune import BUDGET, tune
    from dvit_infer.utils.files import check_output

    name = default_out(options.model, "safetensors") if options.out is None else options.out
    outs = {
        what: check_output(path, what, not_this=options.model)
        for what, path in (("out", name), ("json", options.json), ("report", options.report))
        if path is not None
    }
    if len(set(outs.values())) < len(outs):
        raise InputError("out: model, JSON and report are three files; choose other names")
    kept = outs["out"].with_name(f"{outs['out'].name}.search.json")
    try:
        with _progress() as show:
            result = tune(
                options.model,
                options.folder,
                options.target,
                metric=options.metric,
                methods=None if options.methods is None else options.methods.split(","),
                budget=BUDGET if options.budget is None else options.budget,
                labels=options.labels,
                batch=options.batch,
                arch=options.arch,
                image_size=options.image_size,
                assume=options.assume,
                device=options.device,
                dtype=options.dtype,
                calibrate=options.calibrate,
                backend=options.backend,
                workers=options.workers,
                search_file=kept,
                progress=show,
            )
    except KeyboardInterrupt:
        if kept.exists():
            print(shown(f"{kept} holds what was found: the same command resumes"), file=sys.stderr)
        raise
    where = environment()
    config = result.engine.config
    print(f"{config.arch}; {result.engine.precision} on {where['machine']}, torch {where['torch']}")
    print(
        f"run by {result.engine.runner.runtime}; {result.searched} images searched, {result.held_back.images} held back"
    )
    print(_table(result))
    warn(result.warnings)
    content = {"environment": where, "rows": [asdict(row) for row in result.rows], "tune": result.content()}
    if "json" in outs:
        write_json(outs["json"], content)
        print(f"wrote {options.json}")
    if "report" in outs:
        from dvit_infer.benchmark.report.page import write_report

        write_report(outs["report"], content)
        print(f"wrote {options.report}")
    if result.met:
        result.engine.save(outs["out"])
    kept.unlink(missing_ok=True)  # only now: after a full disk the same command resumes
    if not result.met:
        print(shown(f"{result}"))
        print(f"error: target: no reduction keeps {result.target:g}; {name} was not written", file=sys.stderr)
        return 1
    print(f"wrote {name} ({outs['out'].stat().st_size / 2**20:.1f} MiB): {result.chosen.name}")
    print(shown(f"{result}"))
    return 0


def _table(result: "TuneResult") -> str:
    """Return a table of the points that no other is superior to and of those that were timed, fastest first."""
    from dvit_infer.utils.tables import table

    wanted = {point.name for point in (*result.pareto, result.chosen)}
    points = [point for point in result.points if point.name in wanted or point.measured]
    points.sort(key=lambda point: -point.speedup)
    chosen = next(i for i, point in enumerate(points) if point.name == result.chosen.name)
    first = max(0, min(chosen - LISTED // 2, len(points) - LISTED))
    columns = ("reduction", ">quality", ">95%", ">images", ">MACs", ">speed-up", ">images/s", "")
    rows = [_cells(point, result) for point in points[first : first + LISTED]]
    return table(columns, rows)


def _cells(point: "TunedPoint", result: "TuneResult") -> tuple[str, ...]:
    quality, low, high = (
        f"{value:.4f}" if result.metric == "cosine" else f"{value:.1%}"
        for value in (point.quality, point.low, point.high)
    )
    speed = f"{point.speedup:.2f} x" if point.measured else f"~{point.speedup:.2f} x"
    rate = f"{point.images_per_s:,.1f}" if point.images_per_s is not None else ""
    chosen = "chosen" if point.name == result.chosen.name else ("meets the target" if point.meets else "")
    return (point.title, quality, f"{low} to {high}", str(point.images), f"{point.macs:.0%}", speed, rate, chosen)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float, float], None]]:
    """Show on stderr, if that is a terminal, what is done, the share of the budget, and when it ends at the latest."""
    if not sys.stderr.isatty():
        yield lambda what, share, left: check_interrupt()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress

    columns = ("{task.description}", BarColumn(), "ends at {task.fields[end]} at the latest")
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("loading", total=None, end="...")

        def show(what: str, share: float, left: float) -> None:
            check_interrupt()
            end = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
            bar.update(task, description=what, total=1.0, completed=share, end=end)

        yield show


if __name__ == "__main__":
    sys.exit(main())
