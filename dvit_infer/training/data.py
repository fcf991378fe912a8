"""Training batches: the order of images and their random numbers.

Both depend only on the run's seed, the epoch and an image's index in the set, not on the process, the worker or the
place in a batch, so several processes together see what one process would see.
"""

import hashlib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dvit_infer.errors import InputError
from dvit_infer.images.decode import ImageFileError, open_image
from dvit_infer.images.stream import first_in_worker, interrupts_held
from dvit_infer.training.augment import Augmentation
from dvit_infer.utils.bounds import check_bound

# Purposes of an image's generators. Not 0: [seed, epoch, 0, 0] seeds like [seed, epoch], which is used for the order.
_AUGMENT, _NOISE, _MIX = 1, 2, 3


class ImageFiles:
    """Paths and classes of a training set, stored in one block of bytes: workers would copy a list of strings.

    All paths are below `folder`. It is not part of the `digest`, so the folder may be renamed or moved.
    """

    def __init__(self, entries: Iterable[tuple[str, int]], folder: str = "") -> None:
        names, labels = [], []
        self._folder = os.path.join(folder, "") if folder else ""  # with exactly one trailing slash
        for path, label in entries:
            names.append(os.fsencode(path.removeprefix(self._folder)))
            labels.append(label)
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._labels = np.array(labels, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[str, int]:
        start = int(self._ends[index - 1]) if index else 0
        return self._folder + os.fsdecode(self._names[start : int(self._ends[index])]), int(self._labels[index])

    def classes(self) -> set[int]:
        """Return the classes that have images."""
        return set(np.unique(self._labels).tolist())

    @property
    def digest(self) -> str:
        """A digest of the names and classes, 16 hexadecimal digits."""
        return hashlib.sha256(self._names + self._ends.tobytes() + self._labels.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Loading:
    """The distribution of a run's images over processes and steps.

    Attributes:
        batch: images in a step of the optimiser, over all processes and accumulation steps.
        accumulate: number of parts into which a process splits its share of a step.
        workers: processes that decode; 0: this process decodes.
        rank, world: the index of this training process, and their number.
        mixup, cutmix: parameters of their beta distributions (Zhang et al. 2018; Yun et al. 2019); 0: off.
        noise: (stages, patches), the shape of the Gumbel noise drawn for every image.

    Raises:
        InputError: A number is out of range, or the batch cannot be divided.
    """

    batch: int
    accumulate: int = 1
    seed: int = 0
    workers: int = 0
    rank: int = 0
    world: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    noise: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate"):
            check_bound(name, getattr(self, name), 1 << 24)
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not possible; 1 or more is")
        for name in ("mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}: {getattr(self, name):g} is negative or not a number")
            check_bound(name, getattr(self, name), 1e6, excluded=True)
        if self.batch % self.world:
            count = f"{self.batch} images a step cannot be shared by {self.world} processes"
            raise InputError(f"batch: {count}; use a multiple of {self.world}")
        if self.batch % (self.world * self.accumulate):
            count = f"the {self.batch // self.world} images of a process cannot be taken in {self.accumulate} parts"
            raise InputError(f"accumulate: {count}; use a divisor of that")
        if self.part % 2 and (self.mixup or self.cutmix):
            count = f"{self.batch} images a step are {self.part} at a time, which cannot be mixed in pairs"
            raise InputError(f"batch: {count}; use an even number, or --mixup 0 --cutmix 0")

    @property
    def part(self) -> int:
        """The number of images that a process takes at a time."""
        return self.batch // (self.world * self.accumulate)


@dataclass(frozen=True)
class Batch:
    """The images that a process takes at a time, b of them.

    Attributes:
        images: (b, 3, H, W) uint8, not mixed yet.
        labels: (b,) int64.
        weights: (b,) float32: 1, or 0 for an unreadable image.
        noise: (stages, b, N, 2) float32, Gumbel noise.
        share: (b,) float32, the share of the image itself in its mixture; 1: not mixed.
        boxes: (b, 4) int64, top, left, bottom, right of the box pasted from the partner; all 0: none.
        unreadable: path and reason of each unreadable image file.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    noise: torch.Tensor
    share: torch.Tensor
    boxes: torch.Tensor
    unreadable: list[tuple[str, str]]


def steps_an_epoch(image_files: ImageFiles, loading: Loading) -> int:
    """Return the number of complete batches in an epoch.

    Raises:
        InputError: There is no complete batch.
    """
    if len(image_files) < loading.batch:
        raise InputError(f"batch: {len(image_files)} images are fewer than a batch of {loading.batch}")
    return len(image_files) // loading.batch


def batches(
    image_files: ImageFiles, augmentation: Augmentation, loading: Loading, epoch: int, first_step: int = 0
) -> Iterator[Batch]:
    """Yield this process's part of an epoch from `first_step` on, `loading.accumulate` batches per step.

    Raises:
        InputError: There are fewer images than a batch.
        RuntimeError: A worker process was killed.
    """
    with interrupts_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than processors: as asked
        loader = DataLoader(
            _Maker(image_files, augmentation, loading, epoch),
            batch_size=None,
            sampler=_places(len(image_files), loading, epoch, range(first_step, steps_an_epoch(image_files, loading))),
            num_workers=loading.workers,
            generator=torch.Generator(),
            multiprocessing_context="fork" if loading.workers and sys.platform == "linux" else None,
            collate_fn=_as_it_is,
            worker_init_fn=first_in_worker(),
        )
        made = iter(loader)
    for arrays, unreadable in made:
        images, labels, weights, noise, share, boxes = map(torch.from_numpy, arrays)
        yield Batch(images, labels, weights, noise, share, boxes, unreadable)


def _places(count: int, loading: Loading, epoch: int, steps: range) -> Iterator[list[int]]:
    """Yield the image indices of each batch of this process."""
    order = np.random.Generator(np.random.PCG64([loading.seed, epoch])).permutation(count)
    for step in steps:
        for turn in range(loading.accumulate):
            start = step * loading.batch + (turn * loading.world + loading.rank) * loading.part
            yield order[start : start + loading.part].tolist()


_Made = tuple[tuple[np.ndarray, ...], list[tuple[str, str]]]


def _as_it_is(made: Any) -> Any:
    """Keep NumPy arrays: tensors from a worker would use scarce shared memory."""
    return made


class _Maker(Dataset[_Made]):
    """The dataset that workers run: it turns image indices into the arrays of a `Batch`."""

    def __init__(self, image_files: ImageFiles, augmentation: Augmentation, loading: Loading, epoch: int) -> None:
        self.image_files, self.augmentation, self.loading, self.epoch = image_files, augmentation, loading, epoch

    def __getitem__(self, indices: list[int]) -> _Made:
        height, width = self.augmentation.image_size
        count, (stages, patches) = len(indices), self.loading.noise
        images = np.zeros((count, 3, height, width), np.uint8)
        labels, weights = np.zeros(count, np.int64), np.ones(count, np.float32)
        noise = np.zeros((stages, count, patches, 2), np.float32)
        unreadable = []
        for i, index in enumerate(indices):
            path, labels[i] = self.image_files[index]
            try:
                images[i] = self.augmentation(open_image(path), self._generator(index, _AUGMENT))
            except ImageFileError as error:
                weights[i] = 0
                unreadable.append((path, error.why))
            if stages:
                noise[:, i] = self._generator(index, _NOISE).gumbel(size=(stages, patches, 2))
        share, boxes = np.ones(count, np.float32), np.zeros((count, 4), np.int64)
        if self.loading.mixup or self.loading.cutmix:
            for i in range(0, count, 2):
                if weights[i] and weights[i + 1]:
                    share[i : i + 2], boxes[i : i + 2] = self._mixture(self._generator(indices[i], _MIX), height, width)
        return (images, labels, weights, noise, share, boxes), unreadable

    def _generator(self, index: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.loading.seed, self.epoch, index, purpose]))

    def _mixture(self, rng: np.random.Generator, height: int, width: int) -> tuple[float, tuple[int, int, int, int]]:
        """Return the share of the image itself, and the box pasted from its partner (all 0 for mixup)."""
        mixup, cutmix = self.loading.mixup, self.loading.cutmix
        by_cutmix = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
        share = float(rng.beta(cutmix, cutmix) if by_cutmix else rng.beta(mixup, mixup))
        if not by_cutmix:
            return share, (0, 0, 0, 0)
        rows, columns = (round(side * math.sqrt(1 - share)) for side in (height, width))
        y, x = int(rng.integers(height)), int(rng.integers(width))  # the centre; the box is clipped to the image
        top, bottom = max(0, y - rows // 2), min(height, y - rows // 2 + rows)
        left, right = max(0, x - columns // 2), min(width, x - columns // 2 + columns)
        area = max(0, bottom - top) * max(0, right - left)
        return 1 - area / (height * width), (top, left, bottom, right) if area else (0, 0, 0, 0)


def mixed(images: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mix each of the images (b, 3, H, W), floating point, with its partner at index i ^ 1; keep their dtype."""
    if bool((batch.share == 1).all()):
        return images
    partner = torch.arange(len(images), device=images.device) ^ 1
    others = images[partner]
    boxes = batch.boxes.to(images.device)
    has_box = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    share = batch.share.to(images)  # a float32 share would promote half-precision images
    share = torch.where(has_box, 1, share)
    out = images * share.view(-1, 1, 1, 1) + others * (1 - share.view(-1, 1, 1, 1))
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = (rows >= boxes[:, :1]) & (rows < boxes[:, 2:3])
    across = (columns >= boxes[:, 1:2]) & (columns < boxes[:, 3:])
    return torch.where(inside[:, None, :, None] & across[:, None, None, :], others, out)


def targets(batch: Batch, num_classes: int, smoothing: float) -> torch.Tensor:
    """Return the share of each class in the mixture, (b, K) float32, smoothed (Szegedy et al. 2015b, section 7)."""
    own = F.one_hot(batch.labels, num_classes).float()
    if bool((batch.share < 1).any()):
        partner = own[torch.arange(len(own)) ^ 1]
        own = own * batch.share[:, None] + partner * (1 - batch.share[:, None])
    return own * (1 - smoothing) + smoothing / num_classes
