"""dvit-eval: measure top-1, top-5 and images/s on class folders, archives, or images with a file of labels.

By the model's own classifier, or by k-NN and a linear probe on its features.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.counting import counting
from dvit_infer.cli.eval_features import add_feature_options, is_by_features, measure
from dvit_infer.cli.images import MOST_UNREADABLE, add_options, model_of, one_logit, shown, warn

if TYPE_CHECKING:
    from dvit_infer.classifier import Classifier
    from dvit_infer.evaluate.accuracy import Accuracy
    from dvit_infer.evaluate.by_features import FeatureAccuracy
    from dvit_infer.images.classes import ClassMap
    from dvit_infer.images.preprocess import Preprocess

NAMED = 10  # unreadable images that are printed; the JSON lists all


def _parser() -> Parser:
    parser = Parser(prog="dvit-eval", description="Measure accuracy on labelled images.")
    parser.add_argument("model", metavar="MODEL", help="saved file, checkpoint or ONNX file")
    parser.add_argument("folder", metavar="FOLDER", help="one folder per class, like ImageNet; or a tar or zip of it")
    add_options(parser)
    parser.add_argument("--labels", metavar="FILE", help="the class of each image: CSV (file, class), or one a line")
    parser.add_argument("--against-reference", action="store_true", help="run the reference on the same images")
    add_feature_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _eval, argv)


def _eval(options: argparse.Namespace) -> int:
    from dvit_infer.benchmark.results import environment, write_json
    from dvit_infer.utils.files import check_output

    json_out = None if options.json is None else check_output(options.json, "json", not_this=options.model)
    engine, preprocess, classes = model_of(options, classifies=False)
    found: Accuracy | FeatureAccuracy
    by_features = is_by_features(options, engine.config)
    if by_features:
        found, how, rows = measure(options, engine, preprocess)
    else:
        found, how, rows = _classify(options, engine, preprocess, classes)
    where = environment()
    stages = ",".join(map(str, engine.config.num_keep)) or "all"
    does = "merging to" if engine.config.reduction.merges else "keeping"
    print(f"{engine.config.arch}, {does} {stages} of {engine.config.num_patches} patches; ", end="")
    print(f"{engine.precision} on {where['machine']}, torch {where['torch']}; images {preprocess}")
    print(f"run by {engine.runner.runtime}")
    print(shown(how))
    if not by_features and (note := one_logit(engine.config)):
        print(note)
    print(found)
    for path, why in found.unreadable[:NAMED]:
        print(shown(f"cannot be read: {path}: {why}"))
    if len(found.unreadable) > NAMED:
        print(f"cannot be read: {len(found.unreadable) - NAMED} more")
    if json_out is not None:
        unreadable = [{"image": path, "error": why} for path, why in found.unreadable]
        same = {**_model(engine), "batch": found.batch}
        write_json(
            json_out, {"environment": where, "rows": [{**same, **row, "unreadable": unreadable} for row in rows]}
        )
        print(f"wrote {options.json}")
    if len(found.unreadable) > MOST_UNREADABLE * found.total:
        line = f"{options.folder}: {len(found.unreadable)} of {found.total} images cannot be read"
        print(shown(f"error: {line}, more than {MOST_UNREADABLE:.0%}"), file=sys.stderr)
        return 1
    return 0


def _classify(
    options: argparse.Namespace, engine: "Classifier", preprocess: "Preprocess", classes: "ClassMap | None"
) -> "tuple[Accuracy, str, list[dict[str, Any]]]":
    """Return the accuracy of the model's classifier, how the classes were found, and the row of the result file."""
    from dvit_infer.evaluate.accuracy import measure_accuracy, reference_of
    from dvit_infer.evaluate.one_logit import class_count
    from dvit_infer.images.labelled import labelled_images

    folder = labelled_images(
        options.folder, class_count(engine.config), classes=classes, own=engine.labels, labels=options.labels
    )
    reference = reference_of(engine, options.model) if options.against_reference else None
    warn(folder.warnings)
    with counting("evaluating", lambda: sum(1 for _ in folder.images(ordered=False))) as progress:
        found = measure_accuracy(
            engine,
            folder,
            batch=options.batch,
            preprocess=preprocess,
            workers=options.workers,
            reference=reference,
            progress=progress,
        )
    row: dict[str, Any] = {
        "images": found.images,
        "top1": found.top1,
        "top5": found.top5,
        "images_per_s": found.images_per_s,
        "decode_images_per_s": found.decode_images_per_s,
        "model_images_per_s": found.model_images_per_s,
    }
    if found.confusion is not None:
        row["reference_top1"] = found.reference_top1
        row["top1_agreement"] = found.agreement
        row["confusion"] = found.confusion
    return found, str(folder), [row]


def _model(engine: "Classifier") -> dict[str, Any]:
    return {
        "model": engine.config.arch,
        "keep_rate": engine.config.reduction.keep_rate,
        "runtime": "engine" if engine.config.reduction.stages else "dense",
        "device": engine.device.type,
        "dtype": engine.precision,
    }


if __name__ == "__main__":
    sys.exit(main())
