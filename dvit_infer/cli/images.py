"""Shared by the commands that read images: options for model and images, and loading by them."""

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import REDUCTION, Parser, add_model_options, progress
from dvit_infer.config import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from dvit_infer.classifier import Classifier
    from dvit_infer.config import Config
    from dvit_infer.images.classes import ClassMap
    from dvit_infer.images.preprocess import Preprocess

_OWN = tuple(name.replace("-", "_") for name in REDUCTION)
MOST_UNREADABLE = 0.01  # share of unreadable images up to which a run succeeds


def add_options(parser: Parser, classes: bool = True) -> None:
    """Add the options of commands that read images: of the model, of batches, and of processes that decode.

    `classes`: that for names of classes too.
    """
    parser.add_argument("--batch", type=int, metavar="B", help="images at a time; default: 256 on CUDA, 16 on a CPU")
    add_engine_options(parser, classes)
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode; default: one less than CPUs")


def add_engine_options(parser: Parser, classes: bool = True) -> None:
    """Add the options that say which engine runs and how its images are prepared; `classes`: names of classes too."""
    add_model_options(parser, "device", "dtype", "calibrate", "backend", *REDUCTION, "image-size", "assume")
    names = "class names: one a line, a class and a name a line, or JSON (list or map)"
    if classes:
        parser.add_argument("--classes", metavar="FILE", help=names)
    parser.add_argument(
        "--crop-pct",
        type=float,
        metavar="X",
        help="share of the shorter side that the crop keeps; default: the file's, else the family's",
    )


def model_of(options: argparse.Namespace, classifies: bool = True) -> "tuple[Classifier, Preprocess, ClassMap | None]":
    """Load the engine or ONNX file; return it with its preprocessing and the class map, if given.

    Args:
        options: of the command line.
        classifies: whether the model has to have a classifier.

    Raises:
        InputError: One of these options is invalid, or the model has no classifier.
    """
    from dvit_infer.evaluate.open_model import open_model
    from dvit_infer.images.stream import batch_size, check_fits, worker_count
    from dvit_infer.models.preprocessing import preprocess_for
    from dvit_infer.onnx.engine import is_onnx, onnx_device
    from dvit_infer.utils.devices import is_int8, resolve_device

    device = "cpu" if is_int8(options.dtype) and options.device is None else options.device
    batch = batch_size(options.batch, (onnx_device if is_onnx(options.model) else resolve_device)(device))
    worker_count(options.workers)
    with progress("loading"):
        engine = open_model(options.model, **engine_options(options))
    classes = checked_classes(options, engine.config, classifies)
    check_fits(batch, engine.config.image_size)
    return engine, preprocess_for(engine.config, options.crop_pct), classes


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `convert` that are options of the command line."""
    return {
        name: getattr(options, name)
        for name in (*_OWN, "image_size", "assume", "dtype", "calibrate", "backend", "device")
    }


def checked_classes(options: argparse.Namespace, config: "Config", classifies: bool) -> "ClassMap | None":
    """Check a model that was loaded, and warn of what is assumed about it; return the class map, if given.

    Args:
        options: of the command line.
        config: of the model.
        classifies: whether the model has to have a classifier.

    Raises:
        InputError: It has none, or the class map does not fit.
    """
    from dvit_infer.evaluate.one_logit import check_classes, class_count
    from dvit_infer.images.classes import read_classes

    names_of = getattr(options, "classes", None)
    if classifies or names_of is not None:
        check_classes(config, options.model)
    warn_of_assumed(options, config)
    return None if names_of is None else read_classes(names_of, class_count(config))


def warn_of_assumed(options: argparse.Namespace, config: "Config") -> None:
    """Say on stderr which facts of preprocessing nothing states: a wrong mean or std costs half of the accuracy."""
    left = [what for what in config.assumed if what != "crop_pct" or options.crop_pct is None]
    if not left:
        return
    listed = " and ".join([", ".join(left[:-1]), left[-1]] if len(left) > 1 else left)
    whose = " and ".join(dict.fromkeys(_whose(config, what) for what in left))
    remedy = "--assume " + ",".join(f"{what}={'X' if what == 'crop_pct' else 'R:G:B'}" for what in left)
    if options.model.lower().endswith(".onnx"):
        remedy = f"dvit-convert {remedy}"
    else:
        remedy += ", or a config.json beside it,"
    line = (
        f"{options.model}: {listed} {'are' if len(left) > 1 else 'is'} assumed to be {whose}; {remedy} says otherwise"
    )
    print(shown(f"warning: {line}"), file=sys.stderr)


def _whose(config: "Config", what: str) -> str:
    """Return whose value an assumed fact has: if not a usual one, it follows from the type of the model."""
    usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop_pct": None}
    if getattr(config, what) != usual[what]:
        return "those of its type"
    return "the family's" if what == "crop_pct" else "ImageNet's"


class Tally:
    """Counts of images and of unreadable ones among them, and the first of these with its reason."""

    def __init__(self) -> None:
        self.images = self.unreadable = 0
        self.first = self.why = ""

    def count(self, image: str, why: str | None) -> None:
        self.images += 1
        if why is not None:
            self.unreadable += 1
            self.first, self.why = (self.first, self.why) if self.first else (image, why)

    def status(self) -> int:
        """Return the exit status; if too many images cannot be read, say so.

        Raises:
            InputError: none can be read.
        """
        from dvit_infer.errors import InputError

        if self.unreadable == self.images:
            others = f"; none of the {self.images} images can be read" if self.images > 1 else ""
            raise InputError(f"{self.first}: {self.why}{others}")
        if self.unreadable > MOST_UNREADABLE * self.images:
            line = f"{self.unreadable} of {self.images} images cannot be read, more than {MOST_UNREADABLE:.0%}"
            print(shown(f"error: {line}; the first is {self.first}: {self.why}"), file=sys.stderr)
            return 1
        return 0


def shown(text: str) -> str:
    """Return text that contains file names, made printable on one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def warn(lines: Iterable[str]) -> None:
    """Print warnings on stderr, one line each."""
    for line in lines:
        print(shown(f"warning: {line}"), file=sys.stderr, flush=True)


def one_logit(config: "Config") -> str | None:
    """Return how a model with one logit is read; None if it has more."""
    return None if config.num_classes > 1 else "one logit: class 1 with probability sigmoid(logit), else class 0"
