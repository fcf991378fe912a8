"""dvit-viz: draw the patches that a model keeps or merges."""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.counting import counting
from dvit_infer.cli.images import add_options, model_of, shown

if TYPE_CHECKING:
    import torch

    from dvit_infer.images.entry import Entry
    from dvit_infer.images.stream import Decoded

TRAINED = Path(__file__).resolve().parent.parent / "digits-0.7.pth"  # trained by `make proof`
MOST = 64  # largest number of rows in a grid
NAMES = "saved file or checkpoint (default: a small model trained on digits); files, folders, or quoted patterns"
NAMED = 100  # unreadable images of a heat map that are named; more are only counted


def _parser() -> Parser:
    parser = Parser(prog="dvit-viz", description="Draw the patches that a model keeps or merges, stage by stage.")
    parser.add_argument("names", metavar="[MODEL] IMAGE", nargs="+", help=NAMES)
    parser.add_argument(
        "-o", "--out", metavar="FILE.png", help="default: <first image>.kept.png, or .heat.png, in the current folder"
    )
    heat_map = "draw the share of all images that kept each patch; if they merge, the mean share of a token it has"
    parser.add_argument("--heat-map", action="store_true", help=heat_map)
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _viz, argv)


def _viz(options: argparse.Namespace) -> int:
    from dvit_infer.errors import InputError
    from dvit_infer.evaluate.visualize import check_drops, draw_seen, draw_shares, keep_shares, look
    from dvit_infer.images.archives import find_entries
    from dvit_infer.images.stream import batch_size, batches, decode, running
    from dvit_infer.utils.files import atomic_write, check_output

    options.model, options.images = _model_and_images(options.names)
    found = find_entries(options.images)
    some = list(itertools.islice(found, MOST + 1))
    if len(some) > MOST and not options.heat_map:
        raise InputError(f"more than {MOST} images do not fit in a grid; --heat-map takes any number")
    name = _default_out(options, some[0].path) if options.out is None else options.out
    if not name.lower().endswith(".png"):
        raise InputError(f"out: {name}: a name that ends in .png is expected")
    for source in (
        options.model,
        *([] if options.classes is None else [options.classes]),
        *(image.path for image in some),
    ):
        out = check_output(name, "out", not_this=source)
    engine, preprocess, classes = model_of(options, classifies=False)
    config = engine.config
    check_drops(config)
    batch = batch_size(options.batch, engine.device)
    images = itertools.chain(some, _not_replaced(found, out))
    counts = f"{', '.join(map(str, config.num_keep))} of {config.num_patches}"
    kept = f"{'merged to' if config.reduction.merges else 'kept'} {counts}"
    tally = _Tally()

    def total() -> int:
        return sum(1 for _ in find_entries(options.images))

    with counting("looking at images", total) as progress, running(batch):
        decoded = batches(decode(images, preprocess, options.workers), batch)
        if options.heat_map:
            shares, count = keep_shares(engine, tally.readable(decoded, progress))
            sheet = draw_shares(shares, count, config)
            lines = [*tally.lines(), f"{count} images, {tally.unreadable} that cannot be read; {kept}"]
        else:
            labels = None if classes is None else classes.labels
            seen = look(engine, tally.readable(decoded, progress, all_of_them=True), labels)
            sheet = draw_seen(seen, config)
            pairs = zip(some, seen, strict=True)
            lines = [f"{image.path}: {one.label}{one.share}, {kept}" for image, one in pairs]
    with atomic_write(out, "out") as part:
        sheet.save(part, format="PNG")
    if options.model == str(TRAINED):
        lines.insert(0, "no MODEL was given: using a small model trained on cluttered digits")
    for line in (*lines, f"wrote {name} ({sheet.width}x{sheet.height})"):
        print(shown(line))
    return 0


def _model_and_images(names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Split the names: the first is the model, unless it is an image, a folder of images, or a pattern."""
    from dvit_infer.errors import InputError
    from dvit_infer.images.find import SUFFIXES
    from dvit_infer.models.containers import has_weights

    first = Path(names[0])
    of_images = first.is_dir() and not has_weights(first)
    if first.suffix.lower() in SUFFIXES or of_images or (set("*?[") & set(names[0]) and not first.exists()):
        return str(TRAINED), names
    if len(names) == 1:
        raise InputError(f"{names[0]}: is the model; IMAGE is missing")
    return names[0], names[1:]


class _Tally:
    """Count and names of unreadable images."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._named: list[str] = []

    def readable(
        self, parts: "Iterable[list[Decoded]]", progress: Callable[[int], None], *, all_of_them: bool = False
    ) -> "Iterator[torch.Tensor]":
        """Yield the images, (B, 3, H, W) uint8, without unreadable ones.

        Raises:
            InputError: No image can be read, or one cannot and `all_of_them` is True.
        """
        from dvit_infer.errors import InputError
        from dvit_infer.images.stream import pixels

        some = False
        for part in parts:
            failed = [f"{image.path}: {image.error}" for image in part if image.error is not None]
            if failed and all_of_them:
                raise InputError(failed[0])
            self.unreadable += len(failed)
            self._named += failed[: NAMED - len(self._named)]
            images = pixels(part)
            if images is not None:
                some = True
                yield images
            progress(len(part))
        if not some:
            others = f"; none of the {self.unreadable} images can be read" if self.unreadable > 1 else ""
            raise InputError(self._named[0] + others)

    def lines(self) -> list[str]:
        more = self.unreadable - len(self._named)
        named = [f"cannot be read: {line}" for line in self._named]
        return [*named, f"cannot be read: {more} more"] if more else named


def _not_replaced(images: "Iterable[Entry]", out: Path) -> "Iterator[Entry]":
    """Yield the images; raise InputError if one is the output file."""
    from dvit_infer.utils.files import check_output

    there = out.exists()
    for image in images:
        if there:
            check_output(out, "out", not_this=image.path)
        yield image


def _default_out(options: argparse.Namespace, first: str) -> str:
    stem, kind = Path(first).stem, "kept"
    if options.heat_map:
        folder = options.images[0] if os.path.isdir(options.images[0]) else None
        stem, kind = stem if folder is None else os.path.basename(os.path.realpath(folder)) or "images", "heat"
    # The input name need not be UTF-8; the output name must be.
    return f"{''.join(c if c.isprintable() else '_' for c in stem)}.{kind}.png"


if __name__ == "__main__":
    sys.exit(main())
