"""What the commands that read pictures share: the options for model and pictures, and what becomes of them."""

import argparse
from typing import TYPE_CHECKING

from dvit_infer.cli.common import Parser, assumptions, progress, size

if TYPE_CHECKING:
    from dvit_infer.engine import Engine
    from dvit_infer.pictures.classes import ClassMap
    from dvit_infer.pictures.decode import Preprocess

MOST_UNREADABLE = 0.01  # share of the pictures that may be unreadable in a run that is called a success


def add_options(parser: Parser) -> None:
    parser.add_argument("--batch", type=int, metavar="B", help="pictures at a time; default: 256 on CUDA, 16 on a CPU")
    parser.add_argument("--device", metavar="D", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", metavar="T", help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--keep-rate", type=float, metavar="R", help="default: the model's own")
    parser.add_argument("--method", metavar="M", help="predictor or none (dense)")
    parser.add_argument("--image-size", type=size, metavar="S|HxW", help="default: the model's own")
    parser.add_argument("--assume", type=assumptions, metavar="num_heads=6,skip_lam=2", help="what the file cannot say")
    parser.add_argument("--classes", metavar="FILE.json", help="names of the classes, or class of each name")
    parser.add_argument("--crop-pct", type=float, metavar="X", help="kept of the shorter side; default: the family's")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode; default: one less than CPUs")


def model_of(options: argparse.Namespace) -> "tuple[Engine, Preprocess, ClassMap | None]":
    """The engine, how its pictures are prepared, and the class map if one was given.

    Raises:
        InputError: any of these options cannot be used.
    """
    import dvit_infer as dvit
    from dvit_infer.devices import resolve_device
    from dvit_infer.pictures.classes import read_classes
    from dvit_infer.pictures.decode import Preprocess, preprocess_for
    from dvit_infer.pictures.stream import batch_size, check_fits, worker_count

    batch = batch_size(options.batch, resolve_device(options.device))
    worker_count(options.workers)
    with progress("loading"):
        engine = dvit.convert(
            options.model,
            keep_rate=options.keep_rate,
            method=options.method,
            image_size=options.image_size,
            assume=options.assume,
            device=options.device,
            dtype=options.dtype,
        )
    check_fits(batch, engine.config.image_size)
    preprocess = preprocess_for(engine.config)
    if options.crop_pct is not None:
        preprocess = Preprocess(engine.config.image_size, options.crop_pct)
    classes = None if options.classes is None else read_classes(options.classes, engine.config.num_classes)
    return engine, preprocess, classes


def shown(text: str) -> str:
    """Text with names of files in it, for one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
