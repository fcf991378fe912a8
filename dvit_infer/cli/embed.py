"""dvit-embed: write the features of a collection of images; an interrupted run can be resumed."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.counting import counting
from dvit_infer.cli.images import Tally, add_options, checked_classes, model_of
from dvit_infer.cli.on_ray import add_ray_option, on_ray

if TYPE_CHECKING:
    from dvit_infer.evaluate.embed import Embedding, RowStream
    from dvit_infer.evaluate.embedding_folder import Index

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
    add_ray_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _embed, argv)


def _embed(options: argparse.Namespace) -> int:
    from dvit_infer.evaluate.embed import batch_for, write_rows
    from dvit_infer.images.archives import find_entries

    batch = batch_for(options.out, options.batch, options.store)  # before the model is loaded
    find_entries(options.images)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context((_here if options.ray is None else _on_cluster)(options, batch))
        progress = stack.enter_context(counting("embedding", lambda: sum(1 for _ in find_entries(options.images))))
        found = write_rows(model.stream, model.facts, options.images, options.out, progress)
    index = model.facts
    print(f"{index.arch}, {index.reduction}; {index.precision} on {model.machine}; images {index.preprocess}")
    print(f"run by {model.runtime()}")
    print(_summary(found, options.out))
    tally = Tally()
    tally.images, tally.unreadable = found.images, len(found.failed)
    if found.failed:
        tally.first, tally.why = found.failed[0]
    return tally.status()


class _Model(NamedTuple):
    """A model that was loaded: what gives its rows, the index of them, and what runs it where."""

    stream: "RowStream"
    facts: "Index"
    machine: str
    runtime: Callable[[], str]


@contextlib.contextmanager
def _here(options: argparse.Namespace, batch: int | None) -> Iterator[_Model]:
    from dvit_infer.benchmark.results import machine_name
    from dvit_infer.evaluate.embed import index_of
    from dvit_infer.evaluate.features import Embedder

    engine, preprocess, _ = model_of(options, classifies=False)
    embedder = Embedder(engine, batch, options.pool, options.normalize, preprocess, options.workers)
    yield _Model(embedder, index_of(embedder, options.store), machine_name(None), lambda: engine.runner.runtime)


@contextlib.contextmanager
def _on_cluster(options: argparse.Namespace, batch: int | None) -> Iterator[_Model]:
    from dvit_infer.serve.ray_stream import RowsOnCluster

    with on_ray(options, "Embed", batch, pool=options.pool, normalize=options.normalize) as stream:
        facts = stream.facts
        assert facts.index is not None
        checked_classes(options, facts.config, classifies=False)
        index = replace(facts.index, dtype=options.store)
        yield _Model(RowsOnCluster(stream), index, facts.machine, lambda: facts.runtime)


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
