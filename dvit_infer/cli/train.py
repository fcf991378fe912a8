"""dvit-train: fine-tune a dense model into a dynamic one."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, add_model_options, progress, run, stopping_gently
from dvit_infer.cli.images import shown, warn
from dvit_infer.cli.train_progress import Show, check_logdir, showing

if TYPE_CHECKING:
    import torch

    from dvit_infer.images.classes import LabelledFolder
    from dvit_infer.training.distributed import World
    from dvit_infer.training.loop import Run
    from dvit_infer.training.settings import Settings


MOST_CLASSES = 1 << 24

# For all processes but the first.
_SILENT: Show = (lambda step: None), (lambda epoch: None), (lambda done, total: None)


def _parser() -> Parser:
    parser = Parser(prog="dvit-train", description="Fine-tune a DeiT or LV-ViT into a DynamicViT.")
    add = parser.add_argument
    add(
        "dense",
        metavar="DENSE",
        help="checkpoint of a dense model, recognised as by dvit-convert; or of a dynamic one, to train it further",
    )
    add("folder", metavar="FOLDER", help="contains one folder per class, or train/ and val/ with such folders")
    add(
        "--keep-rate",
        type=float,
        metavar="R",
        help="share of patches kept by the first stage; the next keep its powers; default: a dynamic DENSE's own",
    )
    add(
        "-o",
        "--out",
        metavar="OUT.pth",
        required=True,
        help="output file, written after every epoch; on a disk that all machines share",
    )
    resume = "resume the run of FILE, by default OUT; also for more --epochs, if it is finished"
    add("--resume", nargs="?", const=True, metavar="FILE", help=resume)
    new_head = "begin with a new head; done unasked if FOLDER has another number of classes than DENSE"
    add("--new-head", action="store_true", help=new_head)
    teacher = "the dense model to distil; default: DENSE, without its predictors"
    add("--teacher", metavar="FILE", help=teacher)
    add("--val", metavar="FOLDER", help="class folders for measuring top-1 after every epoch; default: FOLDER/val")
    model = parser.add_argument_group("model")
    add_model_options(model, "arch", "prune-at", "image-size", "assume")
    _add_settings(parser)
    machine = parser.add_argument_group("machine")
    dtypes = "float32, or bfloat16 by autocast; default: bfloat16 on CUDA"
    add_model_options(machine, "device", "dtype", dtype=dtypes)
    machine.add_argument("--workers", type=int, metavar="N", help="processes that decode; default: one less than CPUs")
    machine.add_argument("--logdir", metavar="FOLDER", help="write TensorBoard logs to FOLDER")
    return parser


def _add_settings(parser: Parser) -> None:
    """Add an option for each field of `Settings`; an option that is not given keeps the field's default."""
    numbers: list[tuple[str, Callable[[str], Any], str]] = [
        ("epochs", int, "default: 30"),
        ("batch", int, "images per step, over all processes; default: 128"),
        ("accumulate", int, "parts into which a process splits its share of a step; losses are averaged; default: 1"),
        (
            "lr",
            float,
            "learning rate of the predictors and of a new head; default: 0.001 for batch 1024, scaled linearly",
        ),
        ("min-lr", float, "final learning rate of the cosine; default: 1e-6"),
        ("backbone-lr-scale", float, "learning rate of all other weights, relative to --lr; default: 0.01"),
        ("freeze-epochs", int, "epochs in which only the predictors and a new head are trained; default: 5"),
        ("warmup-epochs", float, "epochs of linear warm-up; default: 1"),
        ("weight-decay", float, "default: 0.05"),
        ("clip", float, "gradient norm at which gradients are clipped; default: 1"),
        ("ratio-weight", float, "weight of the loss of the keep ratios; default: 2"),
        ("ema", float, "decay of averaged weights, which are then written; default: 0 (none)"),
        ("smoothing", float, "label smoothing; default: 0.1"),
        ("mixup", float, "parameter of its beta distribution, 0: off; default: 0.8"),
        ("cutmix", float, "parameter of its beta distribution, 0: off; default: 1"),
        ("scale", float, "smallest share of the area that a crop keeps, 1: no crop; default: 0.08"),
        ("flip", float, "probability of a horizontal flip; default: 0.5"),
        ("randaugment", int, "magnitude, 0: off; default: 9 (needs torchvision)"),
        ("erase", float, "probability of erasing a rectangle; default: 0.25 (needs torchvision)"),
        ("seed", int, "default: 0"),
    ]
    group = parser.add_argument_group("training")
    for name, kind, text in numbers:
        group.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument("--optimizer", metavar="NAME", help="adamw")
    group.add_argument("--per-image", choices=["on", "off"], help="off: only the batch has to keep the rate on average")
    group.add_argument("--token-loss", choices=["mse", "kl"], help="default: mse for DeiT, kl for LV-ViT")


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _train, argv)


def _train(options: argparse.Namespace) -> int:
    from dvit_infer.errors import InputError
    from dvit_infer.images.stream import running
    from dvit_infer.training.distributed import joined, world_of_environment
    from dvit_infer.training.reports import NotFiniteError
    from dvit_infer.training.resuming import resume
    from dvit_infer.utils.devices import resolve_device
    from dvit_infer.utils.threads import limit_threads

    world = world_of_environment()
    name = options.device
    if world.size > 1 and name in (None, "cuda"):
        import torch

        name = f"cuda:{world.local_rank}" if torch.cuda.is_available() or name else "cpu"
    device = resolve_device(name)
    if world.size > 1 and device.type == "mps":
        raise InputError("device: mps trains in one process; start dvit-train without torchrun")
    if device.type == "cpu":
        limit_threads()
    say: Callable[[str], None] = print if world.is_first else lambda line: None
    training, settings = _prepared(options, device, world, say)
    if options.resume is not None:
        source = options.out if options.resume is True else options.resume
        lines = resume(training, source)
        say(f"resuming from {source}: epoch {training.epoch + 1}, step {training.step + 1}")
        for line in lines:
            say(line)
    quiet: contextlib.AbstractContextManager[Show] = contextlib.nullcontext(_SILENT)
    show = showing(settings.epochs, options.logdir) if world.is_first else quiet
    with show as said, joined(world, device), stopping_gently() as stop:
        try:
            with running(settings.batch):
                finished = training.go(*said, stop)
        except NotFiniteError as error:
            there = f"{options.out} holds the last good state" if training.has_saved else "nothing was written"
            if world.is_first:
                print(shown(f"error: {error}; {there}; try a new run with a lower --lr"), file=sys.stderr)
            return 1
    if not finished:
        done = f"step {training.step} of epoch {training.epoch + 1}" if training.step else f"epoch {training.epoch}"
        say(f"stopped after {done}; --resume continues from {options.out}")
        raise KeyboardInterrupt
    say(f"wrote {options.out}")
    return 0


def _prepared(
    options: argparse.Namespace, device: "torch.device", world: "World", say: Callable[[str], None]
) -> "tuple[Run, Settings]":
    """Check everything before the first step; raise InputError if an option or file is invalid."""
    from dataclasses import fields, replace

    from dvit_infer.errors import InputError
    from dvit_infer.images.classes import labelled_folder
    from dvit_infer.images.stream import worker_count
    from dvit_infer.training.augment import Augmentation, has_torchvision
    from dvit_infer.training.data import ImageFiles
    from dvit_infer.training.loop import Run
    from dvit_infer.training.settings import Settings
    from dvit_infer.training.student import make_pair
    from dvit_infer.utils.files import check_output

    given = {f.name: getattr(options, f.name, None) for f in fields(Settings)}
    given["per_image"] = {"on": True, "off": False, None: None}[options.per_image]
    given["dtype"] = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    workers = worker_count(options.workers)
    if options.workers is None:
        workers //= world.local_size
    if options.out.endswith(".safetensors"):
        raise InputError(f"out: {options.out}: the output is not a safetensors file; choose a name that ends in .pth")
    out = check_output(options.out, "out", not_this=options.dense)
    if options.teacher is not None:
        check_output(options.out, "out", not_this=options.teacher)
    if options.logdir is not None:
        check_logdir(options.logdir)
    folder, held_out = _folders(options)
    found = labelled_folder(folder, MOST_CLASSES)
    if len(found.labels) < 2:
        raise InputError(f"{folder}: has only one class folder; at least two are needed")
    pair = make_pair(
        options.dense,
        settings.keep_rate,
        prune_at=options.prune_at,
        arch=options.arch,
        image_size=options.image_size,
        assume=options.assume,
        seed=settings.seed,
        classes=list(found.labels),
        new_head=options.new_head,
        teacher=options.teacher,
    )
    config = pair.config
    settings = replace(settings, keep_rate=config.reduction.keep_rate)
    with progress("listing images") if world.is_first else contextlib.nullcontext():
        image_files = ImageFiles(found.entries(), found.path)
        held = None if held_out is None else labelled_folder(held_out, config.num_classes)
        tests = [] if held is None else _same_classes(held, found)
    filled = image_files.classes()
    if empty := [name for name, label in found.labels.items() if label not in filled]:
        raise InputError(f"{folder}: no image in the class folder {empty[0]!a}")
    fill = tuple(round(255 * mean) for mean in config.mean)
    augmentation = Augmentation(
        config.image_size,
        settings.scale,
        settings.flip,
        settings.randaugment,
        settings.erase,
        (fill[0], fill[1], fill[2]),
        has_torchvision(),
    )
    training = Run(
        pair,
        image_files,
        settings,
        out=out,
        augmentation=augmentation,
        device=device,
        workers=workers,
        world=world,
        held_out=tests,
    )
    resumes = options.resume is True or (options.resume is not None and Path(options.resume).resolve() == out)
    if not resumes and out.exists() and out.stat().st_size and _is_unfinished(out):
        raise InputError(f"out: {options.out} holds an unfinished training; add --resume, or choose another name")
    for note in pair.notes:
        if note.how == "assumed":
            say(shown(f"assumed {note.what} {note.value}: {note.why}"))
    kept = ",".join(map(str, config.num_keep))
    blocks = ",".join(map(str, config.reduction.blocks))
    for remark in pair.remarks:
        say(shown(remark))
    say(f"{config.arch}, keeping {kept} of {config.num_patches} patches before blocks {blocks}")
    say(shown(f"{len(image_files)} images of {len(found.labels)} classes; {augmentation}"))
    if world.is_first:
        warn((*found.warnings, *(() if held is None else held.warnings)))
    return training, settings


def _same_classes(tests: "LabelledFolder", learned: "LabelledFolder") -> list[tuple[str, int]]:
    """Return the held-out images, with classes matched by folder name."""
    from dataclasses import replace

    from dvit_infer.errors import InputError

    for name in tests.labels:
        if name not in learned.labels:
            raise InputError(f"{tests.path}: has a class folder {name!a}, which {learned.path} does not have")
    return list(replace(tests, labels={name: learned.labels[name] for name in tests.labels}).entries())


def _is_unfinished(path: Path) -> bool:
    from dvit_infer.errors import InputError
    from dvit_infer.training import saving

    try:
        return saving.unfinished(path) is not None
    except InputError:
        return False


def _folders(options: argparse.Namespace) -> tuple[str, str | None]:
    """Return the folder of training images, and that of held-out images, if present."""
    inside = {name: Path(options.folder) / name for name in ("train", "val")}
    if all(path.is_dir() for path in inside.values()):
        return str(inside["train"]), options.val or str(inside["val"])
    return options.folder, options.val


if __name__ == "__main__":
    sys.exit(main())
