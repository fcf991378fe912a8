"""dvit-embed: write the features of a collection of images; an interrupted run can be resumed."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.counting import counting
from dvit_infer.cli.images import Tally, add_options, model_of

if TYPE_CHECKING:
    from dvit_infer.evaluate.embed import Embedding

POOL = "own: as the model's owner pools (default); cls: class token; mean: mean of patches; cls_mean: both; map"


def _parser() -> Parser:
    parser = Parser(prog="dvit-embed", description="Write the features of images, one row each, to a folder.")
    parser.add_argument("model", metavar="MODEL", help="saved file or checkpoint")
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", help="files, folders, archives, or patterns in quotes"
    )
    out = "features.npy, images.jsonl and index.json; a folder that is there is completed"
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help=out)
    parser.add_argument("--pool", metavar="P", default="own", help=POOL)
    parser.add_argument("--normalize", action="store_true", help="divide every row by its length")
    parser.add_argument("--store", metavar="T", default="float32", help="dtype of the file: float32 (default), float16")
    add_options(parser, classes=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _embed, argv)


def _embed(options: argparse.Namespace) -> int:
    from dvit_infer.benchmark.results import machine_name
    from dvit_infer.evaluate.embed import embed
    from dvit_infer.evaluate.embedding_folder import read_index
    from dvit_infer.images.archives import find_entries
    from dvit_infer.utils.files import check_output_folder

    read_index(check_output_folder(options.out, "out"))  # before the model is loaded
    find_entries(options.images)
    engine, preprocess, _ = model_of(options, classifies=False)
    with counting("embedding", lambda: sum(1 for _ in find_entries(options.images))) as progress:
        found = embed(
            engine,
            options.images,
            options.out,
            pool=options.pool,
            normalize=options.normalize,
            store=options.store,
            batch=options.batch,
            preprocess=preprocess,
            workers=options.workers,
            progress=progress,
        )
    config = engine.config
    print(f"{config.arch}, {config.reduction}; {engine.precision} on {machine_name(None)}; images {preprocess}")
    print(f"run by {engine.runner.runtime}")
    print(_summary(found, options.out))
    tally = Tally()
    tally.images, tally.unreadable = found.images, len(found.failed)
    if found.failed:
        tally.first, tally.why = found.failed[0]
    return tally.status()


def _summary(found: "Embedding", out: str) -> str:
    index = found.index
    rows = f"{found.images:,} images, {index.dim} features each ({index.pool}{', normalized' * index.normalize})"
    lines = [f"{rows}, {index.dtype}, in {out}"]
    if found.failed:
        lines.append(f"{len(found.failed)} of them cannot be read: their rows are NaN")
    if found.resumed:
        lines.append(f"{found.resumed:,} were there already")
    if found.rates.images:
        lines.append(str(found.rates))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
