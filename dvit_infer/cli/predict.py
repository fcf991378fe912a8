"""dvit-predict: classify a stream of images, one JSON line each; an interrupted run can be resumed."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.counting import counting
from dvit_infer.cli.images import Tally, add_options, checked_classes, model_of, one_logit
from dvit_infer.cli.on_ray import add_ray_option, on_ray

if TYPE_CHECKING:
    from dvit_infer.config import Config
    from dvit_infer.evaluate.predictions import Prediction
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
    add_ray_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _predict, argv)


def _predict(options: argparse.Namespace) -> int:
    from dvit_infer.evaluate.results_file import results
    from dvit_infer.images.archives import find_entries
    from dvit_infer.utils.files import check_output

    out = None if options.out is None else check_output(options.out, "out", not_this=options.model)
    found = find_entries(options.images)
    tally, told = _Tally(), 0
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_on_cluster(options) if options.ray is not None else _here(options))
        if note := one_logit(model.config):
            print(f"note: {note}", file=sys.stderr)
        write: Callable[[list[str]], None] = _print
        if out is not None:
            labelled = model.labels is not None
            file = stack.enter_context(results(out, model.id, kept=options.kept, labelled=labelled))
            write, found = file.append, tally.new(found, file.done)
        # No progress bar if the lines themselves go to the terminal.
        shows = out is not None or not sys.stdout.isatty()
        progress = stack.enter_context(
            counting("predicting", lambda: sum(1 for _ in find_entries(options.images)), shown=shows)
        )
        for group in model.predict(found):
            write([prediction.line(model.id, model.labels) for prediction in group])
            for prediction in group:
                tally.count(prediction.image, prediction.error)
            progress(tally.images - told)
            told = tally.images
    return tally.status()


class _Model(NamedTuple):
    """A model that was loaded: its `model_id`, and what predicts by it."""

    config: "Config"
    id: str
    labels: Mapping[int, str] | None
    predict: "Callable[[Iterable[Entry]], Iterator[list[Prediction]]]"


@contextlib.contextmanager
def _here(options: argparse.Namespace) -> Iterator[_Model]:
    from dvit_infer.evaluate.predictions import model_id, predict

    engine, preprocess, classes = model_of(options)
    labels = engine.labels if classes is None else classes.labels
    given = {"kept": options.kept, "batch": options.batch, "preprocess": preprocess, "workers": options.workers}
    yield _Model(engine.config, model_id(engine, options.model, preprocess), labels, partial(predict, engine, **given))


@contextlib.contextmanager
def _on_cluster(options: argparse.Namespace) -> Iterator[_Model]:
    with on_ray(options, "Classify", options.batch, kept=options.kept) as stream:
        facts = stream.facts
        classes = checked_classes(options, facts.config, classifies=True)
        yield _Model(facts.config, facts.model, facts.labels if classes is None else classes.labels, stream)


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
