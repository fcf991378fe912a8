"""Features of a stream of images: rows of a model, pooled and normalised."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from dvit_infer.classifier import Classifier
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.images.entry import Entry
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import Decoded, batch_size, batches, decode, fetched, pixels, running, worker_count
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.utils.devices import timed
from dvit_infer.utils.text import plural

# What becomes of the tokens: "own": `engine.features`, as the model's owner pools them; "cls": the class token, "mean":
# the mean of the patch tokens that are left, "cls_mean": both side by side, of `engine.tokens`.
POOLS = ("own", "cls", "mean", "cls_mean")
_MAP = "map"  # another name for "own" of a model whose owner pools by attention


def checked_pool(config: Config, pool: str) -> str:
    """Return the name in `POOLS`.

    Raises:
        InputError: it is unknown, or the model has no such tokens.
    """
    has_map = str(getattr(config.body, "pool", "")).startswith(_MAP)
    fit = [name for name in POOLS if getattr(config.body, "class_tokens", 0) or not name.startswith("cls")]
    if pool == _MAP and has_map:
        return "own"
    if pool not in fit:
        why = "has no attention pooling" if pool == _MAP else "has no class token"
        found = why if pool in (*POOLS, _MAP) else f"does not know {pool!r}"
        raise InputError(f"pool: {config.arch} {found}; it has {', '.join(fit + [_MAP] * has_map)}")
    return pool


def pooled(engine: Classifier, images: torch.Tensor, pool: str, normalize: bool) -> torch.Tensor:
    """Return the rows of images (B, 3, H, W): (B, D) float32; with `normalize` of length 1.

    Args:
        pool: one of `POOLS`, which fits the model.
    """
    if pool == "own":
        # A model without classifier returns its features, and a call is what backends are fastest at.
        rows = engine.features(images) if engine.config.num_classes else engine(images)
    else:
        tokens, positions = engine.tokens(images)
        prefix = tokens.shape[1] - positions.shape[1]
        parts = {"cls": tokens[:, 0], "mean": tokens[:, prefix:].mean(dim=1)}
        rows = torch.cat([parts[name] for name in pool.split("_")], dim=1)
    return F.normalize(rows, dim=1) if normalize else rows


class Rows(NamedTuple):
    """The features of a batch, in the order of its images.

    Attributes:
        images: as decoded.
        features: (B, D) float32; NaN for images without any.
        errors: why an image has none.
        seconds: of the model, from pixels in main memory to features.
    """

    images: Sequence[Decoded]
    features: np.ndarray
    errors: Sequence[str | None]
    seconds: float


@dataclass
class Rates:
    """How fast a stream was, and its two halves while they ran side by side.

    Attributes:
        workers: processes that decoded; 0: decoding and model alternated.
        engines: that ran the model side by side.
        images: the number of images.
        seconds: overall.
        decode_seconds: that workers spent decoding, added up.
        model_seconds: of the model, from pixels in main memory to features, added up.
    """

    workers: int
    engines: int = 1
    images: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    model_seconds: float = 0.0

    @property
    def images_per_s(self) -> float:
        return self._rate(self.seconds)

    @property
    def decode_images_per_s(self) -> float:
        """The rate of all workers together."""
        return self._rate(self.decode_seconds) * max(1, self.workers)

    @property
    def model_images_per_s(self) -> float:
        """The rate of all engines together."""
        return self._rate(self.model_seconds) * self.engines

    def add(self, rows: Rows, seconds: float) -> None:
        """Count a batch that took so long overall."""
        self.images += len(rows.images)
        self.seconds += seconds
        self.decode_seconds += sum(image.seconds for image in rows.images)
        self.model_seconds += rows.seconds

    def _rate(self, seconds: float) -> float:
        return self.images / seconds if seconds else math.nan

    def __str__(self) -> str:
        decoders = plural(self.workers, "worker") if self.workers else "no workers"
        text = f"{self.images_per_s:.1f} images/s: decoding {self.decode_images_per_s:.1f} by {decoders}, model "
        text += f"{self.model_images_per_s:.1f}{f' by {self.engines} engines' * (self.engines > 1)}"
        slower = min(self.decode_images_per_s, self.model_images_per_s)
        return f"{text}; {self.images_per_s / slower:.0%} of the slower" if self.workers and slower > 0 else text


class Embedder:
    """Runs one model on streams of images.

    Args:
        engine: gives the features.
        batch, preprocess, workers: as for `predict`.
        pool, normalize: as for `pooled`, but "map" is known too.

    Attributes:
        dim: the length of a row.
        rates: of all streams so far.

    Raises:
        InputError: the pooling does not fit the model, the model gives logits only, or `batch` or `workers` is out of
            range or does not fit in memory.
    """

    def __init__(
        self,
        engine: Classifier,
        batch: int | None = None,
        pool: str = "own",
        normalize: bool = False,
        preprocess: Preprocess | None = None,
        workers: int | None = None,
    ) -> None:
        self.engine, self.normalize = engine, normalize
        self.batch = batch_size(batch, engine.device)
        self.rates = Rates(worker_count(workers))
        self.pool = checked_pool(engine.config, pool)
        self.preprocess = preprocess or preprocess_for(engine.config)
        with running(self.batch):  # the first call selects linears or compiles, and tells the length of a row
            blank = torch.zeros(min(self.batch, engine.micro_batch), 3, *engine.config.image_size, dtype=torch.uint8)
            self.dim = pooled(engine, blank, self.pool, normalize).shape[1]

    def __call__(self, entries: Iterable[Entry]) -> Iterator[Rows]:
        """Yield the features of images, batch by batch; memory does not grow with their number.

        Raises:
            InputError: a worker was killed, or a batch does not fit in memory.
        """
        groups = batches(decode(entries, self.preprocess, self.rates.workers, self.batch), self.batch)
        if self.rates.workers:
            groups = fetched(groups)
        while True:
            start = time.perf_counter()
            with running(self.batch):  # not around the yield: errors of the caller must pass unchanged
                group = next(groups, None)
                rows = None if group is None else self.rows(group)
            if rows is None:
                return
            yield rows  # what the caller does with them takes time too
            self.rates.add(rows, time.perf_counter() - start)

    def rows(self, group: Sequence[Decoded]) -> Rows:
        """Return the features of a batch of images."""
        seconds = 0.0
        features = np.full((len(group), self.dim), np.nan, np.float32)
        errors = [image.error for image in group]
        images = pixels(group)
        if images is not None:
            readable = [at for at, why in enumerate(errors) if why is None]
            out, seconds = timed(lambda: pooled(self.engine, images, self.pool, self.normalize), self.engine.device)
            found = out.cpu().numpy()
            finite = np.isfinite(found).all(axis=1)
            for at, row, is_finite in zip(readable, found, finite, strict=True):
                if is_finite:
                    features[at] = row
                else:
                    errors[at] = f"the model's output in {self.engine.precision} is NaN or Inf"
        return Rows(group, features, errors, seconds)
