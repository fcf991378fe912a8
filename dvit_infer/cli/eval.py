"""dvit-eval: measure top-1, top-5 and images/s on class folders, archives, or images with a file of labels."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.counting import counting
from dvit_infer.cli.images import MOST_UNREADABLE, add_options, model_of, one_logit, shown, warn

if TYPE_CHECKING:
    from dvit_infer.classifier import Classifier
    from dvit_infer.evaluate.accuracy import Accuracy

NAMED = 10  # unreadable images that are printed; the JSON lists all


def _parser() -> Parser:
    parser = Parser(prog="dvit-eval", description="Measure accuracy on labelled images.")
    parser.add_argument("model", metavar="MODEL", help="saved file, checkpoint or ONNX file")
    parser.add_argument("folder", metavar="FOLDER", help="one folder per class, like ImageNet; or a tar or zip of it")
    add_options(parser)
    parser.add_argument("--labels", metavar="FILE", help="the class of each image: CSV (file, class), or one a line")
    parser.add_argument("--against-reference", action="store_true", help="run the reference on the same images")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _eval, argv)


def _eval(options: argparse.Namespace) -> int:
    from dvit_infer.benchmark.results import environment, write_json
    from dvit_infer.evaluate.accuracy import measure_accuracy, reference_of
    from dvit_infer.evaluate.one_logit import class_count
    from dvit_infer.images.labelled import labelled_images
    from dvit_infer.utils.files import check_output

    json_out = None if options.json is None else check_output(options.json, "json", not_this=options.model)
    engine, preprocess, classes = model_of(options)
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
    where = environment()
    stages = ",".join(map(str, engine.config.num_keep)) or "all"
    does = "merging to" if engine.config.reduction.merges else "keeping"
    print(f"{engine.config.arch}, {does} {stages} of {engine.config.num_patches} patches; ", end="")
    print(f"{engine.precision} on {where['machine']}, torch {where['torch']}; images {preprocess}")
    print(f"run by {engine.runner.runtime}")
    print(shown(str(folder)))
    if note := one_logit(engine.config):
        print(note)
    print(found)
    for path, why in found.unreadable[:NAMED]:
        print(shown(f"cannot be read: {path}: {why}"))
    if len(found.unreadable) > NAMED:
        print(f"cannot be read: {len(found.unreadable) - NAMED} more")
    if json_out is not None:
        write_json(json_out, {"environment": where, "rows": [_row(engine, found)]})
        print(f"wrote {options.json}")
    if found.unreadable_share > MOST_UNREADABLE:
        total = found.images + len(found.unreadable)
        line = f"{options.folder}: {len(found.unreadable)} of {total} images cannot be read"
        print(shown(f"error: {line}, more than {MOST_UNREADABLE:.0%}"), file=sys.stderr)
        return 1
    return 0


def _row(engine: "Classifier", found: "Accuracy") -> dict[str, Any]:
    row = {
        "model": engine.config.arch,
        "keep_rate": engine.config.reduction.keep_rate,
        "runtime": "engine" if engine.config.reduction.stages else "dense",
        "device": engine.device.type,
        "dtype": engine.precision,
        "batch": found.batch,
        "images": found.images,
        "top1": found.top1,
        "top5": found.top5,
        "images_per_s": found.images_per_s,
        "decode_images_per_s": found.decode_images_per_s,
        "model_images_per_s": found.model_images_per_s,
        "unreadable": [{"image": path, "error": why} for path, why in found.unreadable],
    }
    if found.confusion is not None:
        row["reference_top1"] = found.reference_top1
        row["top1_agreement"] = found.agreement
        row["confusion"] = found.confusion
    return row


if __name__ == "__main__":
    sys.exit(main())
