"""The images of a search: a sample in main memory, of which a part is held back, and how many of them differ."""

import hashlib
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from dvit_infer.classifier import Classifier
from dvit_infer.errors import InputError
from dvit_infer.evaluate.one_logit import class_count
from dvit_infer.images.entry import Entry
from dvit_infer.images.find import find_images
from dvit_infer.images.labelled import labelled_images
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import decode
from dvit_infer.images.tensors import check_images
from dvit_infer.models.preprocessing import preprocess_for

MOST, MOST_BYTES = 2000, 1 << 30  # images, and their bytes, that are held
LEAST = 3  # one of them is held back
SEED = 0
_THUMB, _ALIKE = 8, 2.0  # images whose thumbnails of 8 x 8 differ by less on average, of 255 levels, are alike


@dataclass(frozen=True)
class Sample:
    """Images and, if they are known, their classes, in a random order that the seed fixes.

    Attributes:
        images: (n, 3, H, W), uint8 or normalised.
        labels: (n,) int64, or None.
        searched: how many of them, the first, are searched; the others are held back.
        warnings: what was left out, one line each.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    searched: int
    warnings: tuple[str, ...] = ()

    @property
    def held_back(self) -> int:
        return len(self.images) - self.searched


def sample_of(
    source: str | Path | Sequence[str] | torch.Tensor,
    engine: Classifier,
    labels: str | Path | torch.Tensor | None = None,
    with_labels: bool = False,
    preprocess: Preprocess | None = None,
    workers: int | None = None,
    seed: int = SEED,
    progress: Callable[[float], None] = lambda share: None,
) -> Sample:
    """Read a sample of images, drawn uniformly, at most `MOST`; a third is held back.

    Args:
        source: a folder, files or patterns (`find_images`), or images as the engine takes them.
        engine: the model; its preprocessing is used.
        labels: the file that gives classes (`labelled_images`), or (n,) classes of images that are given.
        with_labels: whether classes are needed.
        preprocess, workers: as for `measure_accuracy`.
        seed: of the order.
        progress: called with the share that was read.

    Raises:
        InputError: there are too few images, none can be read, or they have no classes.
    """
    warnings: list[str] = []
    if isinstance(source, torch.Tensor):
        name, images, found = "images", _given(source, engine, labels, with_labels), labels
    else:
        name = str(source if isinstance(source, str | Path) else source[0] if source else "images")
        images, found, warnings = _read(source, engine, labels, with_labels, preprocess, workers, seed, progress)
    if len(images) < LEAST:
        count = f"{len(images)} image{'s' * (len(images) != 1)}"
        raise InputError(f"{name}: {count} to search; {LEAST} or more are needed, one of them to be held back")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: _most(images[0].nbytes)]
    chosen = found[order] if isinstance(found, torch.Tensor) else None
    return Sample(images[order], chosen, len(order) - max(1, round(len(order) / 3)), tuple(warnings))


def _most(bytes_each: int) -> int:
    return max(LEAST, min(MOST, MOST_BYTES // bytes_each))


def _given(
    images: torch.Tensor, engine: Classifier, labels: str | Path | torch.Tensor | None, with_labels: bool
) -> torch.Tensor:
    try:
        check_images(images, engine.config)
    except ValueError as error:
        raise InputError(str(error)) from None
    if with_labels and not isinstance(labels, torch.Tensor):
        raise InputError("labels: metric top1 of images that are given needs their classes, (n,) int64")
    if isinstance(labels, torch.Tensor) and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
        raise InputError(f"labels: {labels.dtype} of shape {tuple(labels.shape)}; int64 ({len(images)},) is expected")
    return images


def _read(
    source: str | Path | Sequence[str],
    engine: Classifier,
    labels: str | Path | torch.Tensor | None,
    with_labels: bool,
    preprocess: Preprocess | None,
    workers: int | None,
    seed: int,
    progress: Callable[[float], None],
) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    names = [str(source)] if isinstance(source, str | Path) else [str(one) for one in source]
    warnings: list[str] = []
    if with_labels:
        if len(names) != 1 or isinstance(labels, torch.Tensor):
            raise InputError("labels: metric top1 needs a folder of class folders, or a file of labels beside it")
        folder = labelled_images(names[0], class_count(engine.config), own=engine.labels, labels=labels)
        entries, warnings = list(folder.images()), list(folder.warnings)
    else:
        entries = [Entry(path) for path in find_images(names)]
    height, width = engine.config.image_size
    chance = random.Random(seed)
    # Not the first ones: they are of one class.
    drawn = heapq.nsmallest(_most(3 * height * width), entries, key=lambda entry: chance.random())
    if len(drawn) < len(entries):
        warnings.append(f"{names[0]}: {len(drawn):,} of {len(entries):,} images are used, drawn at random")
    pixels, classes, unreadable = [], [], 0
    for done, image in enumerate(decode(drawn, preprocess or preprocess_for(engine.config), workers), 1):
        progress(done / len(drawn))
        if image.pixels is None:
            unreadable += 1
            continue
        pixels.append(torch.from_numpy(image.pixels))
        classes.append(-1 if image.label is None else image.label)
    if unreadable:
        warnings.append(f"{names[0]}: {unreadable} of {len(drawn)} images cannot be read")
    if not pixels:
        raise InputError(f"{names[0]}: none of {len(drawn)} images can be read")
    return torch.stack(pixels), torch.tensor(classes) if with_labels else None, warnings


def distinct(images: torch.Tensor) -> int:
    """Return how many images (n, 3, H, W) differ by more than noise; frames of a film that stands still are one.

    Two are alike if their thumbnails are: 8 x 8 means of grey, as bytes.
    """
    grey = torch.stack([image.float().mean(dim=0) for image in images])
    thumbs = F.adaptive_avg_pool2d(grey[:, None], _THUMB).flatten(1)
    if images.dtype != torch.uint8:  # normalised: a deviation of 1 is about 58 levels
        thumbs = thumbs * 58
    firsts: list[torch.Tensor] = []
    for thumb in thumbs:
        if not firsts or (torch.stack(firsts) - thumb).abs().mean(dim=1).min() >= _ALIKE:
            firsts.append(thumb)
    return len(firsts)


def digest(sample: Sample) -> bytes:
    """Return bytes that identify the images, their order and their classes."""
    found = hashlib.blake2b(f"{tuple(sample.images.shape)} {sample.images.dtype}".encode(), digest_size=16)
    for tensor in (sample.images, sample.labels):
        if tensor is not None:
            found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.digest()
