"""dvit-predict: classify a stream of images, one JSON line each; an interrupted run can be resumed."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.counting import counting
from dvit_infer.cli.images import Tally, add_options, model_of, one_logit

if TYPE_CHECKING:
    from dvit_infer.images.entry import Entry
    from dvit_infer.images.path_set import Names


def _parser() -> Parser:
    parser = Parser(prog="dvit-predict", description="Classify images: one JSON line each with the top five classes.")
    parser.add_argument("model", metavar="MODEL", help="saved file, checkpoint or ONNX file")
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", help="files, folders, archives, or patterns in quotes"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="append to FILE; images that are in it already are skipped")
    kept = "add the positions of the patches that every stage keeps; if it merges, the group of every patch"
    parser.add_argument("--kept", action="store_true", help=kept)
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _predict, argv)


def _predict(options: argparse.Namespace) -> int:
    from dvit_infer.evaluate.predictions import model_id, predict
    from dvit_infer.evaluate.results_file import results
    from dvit_infer.images.archives import find_entries
    from dvit_infer.utils.files import check_output

    out = None if options.out is None else check_output(options.out, "out", not_this=options.model)
    found = find_entries(options.images)
    engine, preprocess, classes = model_of(options)
    model = model_id(engine, options.model, preprocess)
    labels = engine.labels if classes is None else classes.labels
    if note := one_logit(engine.config):
        print(f"note: {note}", file=sys.stderr)
    tally, told = _Tally(), 0
    with contextlib.ExitStack() as stack:
        write: Callable[[list[str]], None] = _print
        if out is not None:
            file = stack.enter_context(results(out, model, kept=options.kept, labelled=labels is not None))
            write, found = file.append, tally.new(found, file.done)
        # No progress bar if the lines themselves go to the terminal.
        shows = out is not None or not sys.stdout.isatty()
        progress = stack.enter_context(
            counting("predicting", lambda: sum(1 for _ in find_entries(options.images)), shown=shows)
        )
        groups = predict(
            engine,
            found,
            kept=options.kept,
            batch=options.batch,
            preprocess=preprocess,
            workers=options.workers,
        )
        for group in groups:
            write([prediction.line(model, labels) for prediction in group])
            for prediction in group:
                tally.count(prediction.image, prediction.error)
            progress(tally.images - told)
            told = tally.images
    return tally.status()


class _Tally(Tally):
    """Counts of requested images, done now or before, and of unreadable ones among them."""

    def new(self, found: "Iterator[Entry]", done: "Names") -> "Iterator[Entry]":
        """Yield images that are not in the file yet, each once; count the others by their entry in the file."""
        for image in found:
            failed = done.get(image.path)
            if failed is None:
                done.add([(image.path, False)])
                yield image
            else:
                self.count(image.path, "could not be read, by the results file" if failed else None)


def _print(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
