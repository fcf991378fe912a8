"""The part of dvit-eval that needs no classifier: k nearest neighbours and a linear probe on features."""

import argparse
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser
from dvit_infer.cli.counting import counting
from dvit_infer.cli.embed import POOL
from dvit_infer.cli.images import warn

if TYPE_CHECKING:
    from dvit_infer.classifier import Classifier
    from dvit_infer.config import Config
    from dvit_infer.evaluate.by_features import FeatureAccuracy
    from dvit_infer.images.preprocess import Preprocess


def add_feature_options(parser: Parser) -> None:
    group = parser.add_argument_group(
        "by features", "for models without classifier, and for any other if one of the first two is given"
    )
    group.add_argument("--knn", type=int, metavar="K", help="by the K nearest neighbours; without classifier 20")
    strength = "by a linear probe, scikit-learn's logistic regression; C is 1 by default"
    group.add_argument("--probe", type=float, nargs="?", const=1.0, metavar="C", help=strength)
    train = "images to learn from; default: every image is classified by the others of FOLDER"
    group.add_argument("--train", metavar="FOLDER", help=train)
    group.add_argument("--pool", metavar="P", help=POOL)


def is_by_features(options: argparse.Namespace, config: "Config") -> bool:
    """Return whether images are to be classified by features.

    Raises:
        InputError: an option is given that fits the other way only.
    """
    from dvit_infer.errors import InputError

    if not config.num_classes or options.knn is not None or options.probe is not None:
        if options.classes is not None:
            raise InputError("classes: k-NN and probes take the names of folders as classes; leave it out")
        if options.against_reference:
            raise InputError("against_reference: compares logits; k-NN and probes read features, so leave it out")
        return True
    for name in ("train", "pool"):
        if getattr(options, name) is not None:
            raise InputError(f"{name}: is for classification by features; --knn or --probe would do that")
    return False


def measure(
    options: argparse.Namespace, engine: "Classifier", preprocess: "Preprocess"
) -> tuple["FeatureAccuracy", str, list[dict[str, Any]]]:
    """Return the accuracy, how the classes were found, and a row of the result file for every classifier."""
    from dvit_infer.evaluate.by_features import measure_features
    from dvit_infer.evaluate.features import Embedder
    from dvit_infer.evaluate.neighbours import NEIGHBOURS
    from dvit_infer.images.class_names import Names
    from dvit_infer.images.labelled import named_images

    names = Names()
    train = None if options.train is None else named_images(options.train, names, labels=options.labels)
    folder = named_images(options.folder, names, labels=options.labels)
    folders = [folder] if train is None else [train, folder]
    for one in folders:
        warn(one.warnings)
    embedder = Embedder(engine, options.batch, options.pool or "own", preprocess=preprocess, workers=options.workers)
    with counting("embedding", lambda: sum(1 for one in folders for _ in one.images(ordered=False))) as progress:
        found = measure_features(
            embedder,
            folder,
            names,
            train,
            neighbours=NEIGHBOURS if options.knn is None and options.probe is None else options.knn,
            strength=options.probe,
            progress=progress,
        )
    warn(found.warnings)
    rows = [
        {
            "classifier": one.classifier,
            "k" if one.classifier == "knn" else "C": one.setting,
            "pool": embedder.pool,
            "train_images": found.train_images,
            "images": found.images,
            "top1": one.top1,
            "top5": one.top5,
            "images_per_s": found.rates.images_per_s,
            "decode_images_per_s": found.rates.decode_images_per_s,
            "model_images_per_s": found.rates.model_images_per_s,
        }
        for one in found.scores
    ]
    return found, str(folder), rows
