"""Measure accuracy and speed on a folder of images, and agreement with the reference."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dvit_infer.classifier import Classifier
from dvit_infer.engine import checkpoint_of
from dvit_infer.errors import InputError
from dvit_infer.evaluate.one_logit import as_classes, check_classes
from dvit_infer.images.labelled import Labelled
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import Decoded, batch_size, batches, decode, pixels, running, worker_count
from dvit_infer.images.tensors import normalise
from dvit_infer.models.checkpoint import Source
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.models.reference import Reference
from dvit_infer.models.registry import build_reference
from dvit_infer.onnx.engine import is_onnx
from dvit_infer.parity.verification import evaluate
from dvit_infer.utils.devices import timed
from dvit_infer.utils.tables import table


@dataclass(frozen=True)
class Accuracy:
    """The outcome of `measure_accuracy`; `str()` is the table. Values are NaN if no image could be read.

    Attributes:
        images: number of images that were read and classified.
        top1, top5: percentage of them with the label first, or among the first five (or all, if fewer).
        images_per_s: overall; None if the reference ran too, because the workers decode ahead meanwhile.
        decode_images_per_s: decoding rate of all workers together, by the time they spent decoding while the model ran.
        model_images_per_s: rate of the engine, from pixels in main memory to logits, while the workers ran.
        batch: images at a time.
        workers: worker processes; 0: decoding and model alternated.
        unreadable: path and reason of every skipped image file.
        not_finite: outputs with NaN or Inf, which count as wrong.
        confusion: images by [engine right, wrong] and [reference right, wrong]; None: without reference.
        agreement: share of images with the same top-1 class as the reference.
    """

    images: int
    top1: float
    top5: float
    images_per_s: float | None
    decode_images_per_s: float
    model_images_per_s: float
    batch: int
    workers: int
    unreadable: tuple[tuple[str, str], ...]
    not_finite: int
    confusion: tuple[tuple[int, int], tuple[int, int]] | None = None
    agreement: float | None = None

    @property
    def reference_top1(self) -> float | None:
        """The top-1 accuracy of the reference, in percent."""
        return None if self.confusion is None else _percent(sum(row[0] for row in self.confusion), self.images)

    @property
    def total(self) -> int:
        """The number of images, with unreadable ones."""
        return self.images + len(self.unreadable)

    def __str__(self) -> str:
        decoders = f"{self.workers} worker{'s' if self.workers > 1 else ''}" if self.workers else "no workers"
        rows = [
            ("images", str(self.images)),
            ("top-1", f"{self.top1:.2f}%"),
            ("top-5", f"{self.top5:.2f}%"),
            ("images/s", "-" if self.images_per_s is None else f"{self.images_per_s:.1f}"),
            (f"images/s of decoding, {decoders}", f"{self.decode_images_per_s:.1f}"),
            ("images/s of the model", f"{self.model_images_per_s:.1f}"),
        ]
        if self.unreadable:
            rows.append(("could not be read", str(len(self.unreadable))))
        if self.not_finite:
            rows.append(("outputs with NaN or Inf, counted as wrong", str(self.not_finite)))
        if self.confusion is None:
            return table(("", ">engine"), rows)
        rows += [("reference, top-1", f"{self.reference_top1:.2f}%"), ("top-1 agreement", f"{self.agreement:.2%}")]
        names = ("engine right", "engine wrong")
        sides = [(name, *map(str, row)) for name, row in zip(names, self.confusion, strict=True)]
        return "\n".join([table(("", ">engine"), rows), table(("", ">reference right", ">reference wrong"), sides)])


def reference_of(engine: Classifier, source: Source) -> Reference:
    """Return the engine's reference model, built from its source file, in float32, on its device.

    Raises:
        InputError: The source is an ONNX file, which holds no weights under their official names.
    """
    if is_onnx(source):
        raise InputError(f"against_reference: {source} holds no reference model; the checkpoint does")
    return build_reference(engine.config, checkpoint_of(engine, source)).to(engine.device)


def measure_accuracy(
    engine: Classifier,
    folder: Labelled,
    *,
    batch: int | None = None,
    preprocess: Preprocess | None = None,
    workers: int | None = None,
    reference: Reference | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Accuracy:
    """Classify every image of a folder or archive (`labelled_images`) and measure accuracy and speed.

    Args:
        batch: images at a time; None: 256 on CUDA, 16 on a CPU.
        preprocess: None: `preprocess_for`, as the model was evaluated.
        workers: processes that decode; 0: none; None: one less than processors, at most 8.
        reference: a model that classifies the same images (`reference_of`).
        progress: called with the number of images done since the last call.

    Raises:
        InputError: `batch` or `workers` is out of range, or a batch does not fit in memory.
    """
    batch = batch_size(batch, engine.device)
    workers = worker_count(workers)
    check_classes(engine.config, "engine")
    stream = decode(folder.images(), preprocess or preprocess_for(engine.config), workers, batch)
    counts = _Counts()
    with running(batch):
        # The first call selects linears or captures a graph; exclude it from the timing.
        engine(torch.zeros(min(batch, engine.micro_batch), 3, *engine.config.image_size, dtype=torch.uint8))
        start = time.perf_counter()
        for group in batches(stream, batch):
            counts.take(group, engine, reference)
            progress(len(group))
    seconds = time.perf_counter() - start
    images = counts.images
    both, engine_only, reference_only, neither = counts.sides.tolist()
    return Accuracy(
        images=images,
        top1=_percent(counts.top1, images),
        top5=_percent(counts.top5, images),
        images_per_s=images / seconds if reference is None else None,
        decode_images_per_s=_rate((images + len(counts.unreadable)) * max(1, workers), counts.decode_seconds),
        model_images_per_s=_rate(images, counts.model_seconds),
        batch=batch,
        workers=workers,
        unreadable=tuple(counts.unreadable),
        not_finite=counts.not_finite,
        confusion=None if reference is None else ((both, engine_only), (reference_only, neither)),
        agreement=None if reference is None else counts.agree / max(1, images),
    )


class _Counts:
    """Counts that accumulate over batches."""

    def __init__(self) -> None:
        self.images = self.top1 = self.top5 = self.not_finite = self.agree = 0
        self.sides = torch.zeros(4, dtype=torch.int64)  # both right, engine only, reference only, neither
        self.decode_seconds = self.model_seconds = 0.0
        self.unreadable: list[tuple[str, str]] = []

    def take(self, group: Sequence[Decoded], engine: Classifier, reference: Reference | None) -> None:
        self.decode_seconds += sum(image.seconds for image in group)
        self.unreadable += [(image.path, image.error) for image in group if image.error is not None]
        images = pixels(group)
        if images is None:
            return
        logits, seconds = timed(lambda: engine(images), engine.device)
        self.model_seconds += seconds
        labels = torch.tensor([image.label for image in group if image.error is None])
        top, finite = _top(logits)
        correct = (top[:, 0] == labels) & finite
        self.images += len(images)
        self.top1 += int(correct.sum())
        self.top5 += int(((top == labels[:, None]).any(dim=1) & finite).sum())
        self.not_finite += int((~finite).sum())
        if reference is not None:
            mean, std = engine.config.mean, engine.config.std
            expected, sound = _top(evaluate(reference, normalise(images, mean, std)).logits)
            self.agree += int(((top[:, 0] == expected[:, 0]) & finite & sound).sum())
            sides = 2 * ~correct + ~((expected[:, 0] == labels) & sound)
            self.sides += torch.bincount(sides, minlength=4)


def _top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (B, 5) best classes (or all, if fewer), and (B,) whether the logits are finite."""
    logits = as_classes(logits.cpu())
    return logits.topk(min(5, logits.shape[1])).indices, torch.isfinite(logits).all(dim=1)


def _percent(count: int, of: int) -> float:
    return 100 * count / of if of else math.nan


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else math.nan
