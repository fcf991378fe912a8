"""dvit-bench: reference, dense engine and pruned engine side by side in one run."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dvit_infer.cli.common import Parser, integers, progress, run

if TYPE_CHECKING:
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
        "--compare", metavar="NAME[,NAME...]", help="of reference, dense, compile; default: reference,dense"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _bench, argv)


def _bench(options: argparse.Namespace) -> int:
    from dvit_infer.compare import USUAL, Comparison
    from dvit_infer.errors import InputError
    from dvit_infer.files import check_output
    from dvit_infer.timing import environment, write_results

    json_out = None if options.json is None else check_output(options.json, "json", not_this=options.model)
    if wrong := [batch for batch in options.batch or () if not 1 <= batch <= 1 << 24]:
        raise InputError(f"batch: {wrong[0]} pictures cannot be measured; 1 or more can")
    with progress("loading"):
        names = options.compare.split(",") if options.compare is not None else USUAL
        comparison = Comparison(options.model, names, options.device, options.dtype)
    outcomes = []
    for batch in options.batch or (256 if comparison.device.type == "cuda" else 8,):
        with progress(f"batch {batch}") as show:
            outcomes.append(comparison.measure(batch, SECONDS, show))
    rows = [row for outcome in outcomes for row in outcome.rows]
    where = environment()
    stages = ",".join(map(str, comparison.config.num_keep)) or "all"
    print(f"{comparison.config.arch}, keeping {stages} of {comparison.config.num_patches} patches; ", end="")
    print(f"{rows[0].dtype} on {where['machine']}, torch {where['torch']}; speed-up over {comparison.baseline}")
    print(_table(rows))
    for outcome in outcomes:
        if str(outcome):
            print(f"batch {outcome.rows[0].batch}: {outcome}")
    if json_out is not None:
        write_results(json_out, where, rows)
        print(f"wrote {options.json}")
    return 0


def _table(rows: "Sequence[Row]") -> str:
    from dvit_infer.tables import table

    columns = (
        *(">batch", "how", ">images/s", ">p50 ms", ">p99 ms", ">10^9 madds"),
        *(">speed-up", ">peak MiB", ">max error", ">top-1"),
    )
    cells = [
        (
            str(row.batch),
            row.how if row.mode is None else f"{row.how} ({row.mode})",
            f"{row.images_per_s:.1f}",
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


if __name__ == "__main__":
    sys.exit(main())
