"""Accuracy of classifiers on features: k nearest neighbours and a linear probe, for models with or without a head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dvit_infer.errors import InputError
from dvit_infer.evaluate.features import Embedder, Rates
from dvit_infer.evaluate.neighbours import NEIGHBOURS, check_neighbours, vote
from dvit_infer.evaluate.probe import check_probe, probe
from dvit_infer.images.class_names import Names
from dvit_infer.images.labelled import Labelled
from dvit_infer.utils.tables import table
from dvit_infer.utils.text import listed, plural


@dataclass(frozen=True)
class Scores:
    """The accuracy of one classifier.

    Attributes:
        classifier: "knn" or "probe".
        setting: the number of neighbours, or C.
        top1, top5: percentage of the images with their class first, or among the first five.
    """

    classifier: str
    setting: float
    top1: float
    top5: float

    def __str__(self) -> str:
        return f"{self.setting:g} nearest neighbours" if self.classifier == "knn" else "linear probe"


@dataclass(frozen=True)
class FeatureAccuracy:
    """The outcome of `measure_features`; `str()` is the table.

    Attributes:
        scores: of every classifier.
        images: those that were classified.
        train_images: those that the classifiers are made of; None: for each image, of others.
        batch: images at a time.
        rates: with which the features of all of them were made.
        unreadable: path and reason of every image without features.
        warnings: what may be wrong, one line each.
    """

    scores: tuple[Scores, ...]
    images: int
    train_images: int | None
    batch: int
    rates: Rates
    unreadable: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    @property
    def total(self) -> int:
        """The number of images of both kinds, with unreadable ones."""
        return self.images + (self.train_images or 0) + len(self.unreadable)

    def __str__(self) -> str:
        rows = [(str(one), f"{one.top1:.2f}%", f"{one.top5:.2f}%") for one in self.scores]
        by = "the others" if self.train_images is None else plural(self.train_images, "training image")
        head = f"{plural(self.images, 'image')} by {by}"
        return "\n".join([table((head, ">top-1", ">top-5"), rows), str(self.rates)])


def measure_features(
    embedder: Embedder,
    folder: Labelled,
    names: Names,
    train: Labelled | None = None,
    *,
    neighbours: int | None = NEIGHBOURS,
    strength: float | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> FeatureAccuracy:
    """Classify images by the features of others, and measure accuracy.

    Args:
        embedder: the model.
        folder: images and their classes (`named_images`).
        names: of the classes of both folders.
        train: images that classifiers are made of. None: those of the folder itself; every image is then classified by
            its neighbours among the others, and by probes that were fitted without it (`probe`).
        neighbours: of the k-NN classifier; None: no k-NN.
        strength: of the linear probe, scikit-learn's C; None: no probe.
        progress: called with the number of images embedded since the last call.

    Raises:
        InputError: there are too few images for the classifier, or none can be read.
    """
    warnings = _check(folder, train, names.names, neighbours, strength)
    unreadable: list[tuple[str, str]] = []
    features, labels = _features(embedder, folder if train is None else train, unreadable, progress)
    asked = None if train is None else _features(embedder, folder, unreadable, progress)
    queries, expected = (None, labels) if asked is None else asked
    scores = []
    if neighbours is not None:
        votes = vote(features, labels, queries, neighbours)
        scores.append(_scored("knn", neighbours, votes, expected))
    if strength is not None:
        asked_rows = None if queries is None else queries.numpy()
        shares = probe(features.numpy(), labels.numpy(), names.names, asked_rows, strength)
        scores.append(_scored("probe", strength, torch.from_numpy(shares), expected))
    return FeatureAccuracy(
        scores=tuple(scores),
        images=len(expected),
        train_images=None if train is None else len(features),
        batch=embedder.batch,
        rates=embedder.rates,
        unreadable=tuple(unreadable),
        warnings=warnings,
    )


def _check(
    folder: Labelled, train: Labelled | None, names: Sequence[str], neighbours: int | None, strength: float | None
) -> tuple[str, ...]:
    """Return a warning of classes that nothing is to be learnt from.

    What is known to fail is said here, before hours of work; of the images that are counted, some may be unreadable.
    """
    asked = known = _counts(folder, len(names))
    if train is not None:
        known = _counts(train, len(names))
    if neighbours is not None:
        check_neighbours(neighbours, int(known.sum()) - (train is None))
    if strength is not None:
        check_probe(known, names, alone=train is None, strength=strength)
    missing = [names[at] for at in np.flatnonzero((known == 0) & (asked > 0)).tolist()]
    if len(missing) == np.count_nonzero(asked):
        raise InputError(f"train: has no image of the classes to be told apart: {listed(missing)}")
    return (f"no image to learn from in {plural(len(missing), 'class')}: {listed(missing)}",) if missing else ()


def _counts(folder: Labelled, num_classes: int) -> np.ndarray:
    """Return the number of images of each class, (K,)."""
    counts = np.zeros(num_classes, np.int64)
    for image in folder.images(ordered=False):
        counts[image.label] += 1
    return counts


def _features(
    embedder: Embedder, folder: Labelled, unreadable: list[tuple[str, str]], progress: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features (N, D) and classes (N,) of the images that have features; note the others."""
    features, labels = [], []
    for rows in embedder(folder.images()):
        readable = [at for at, why in enumerate(rows.errors) if why is None]
        features.append(rows.features[readable])
        labels += [rows.images[at].label for at in readable]
        unreadable += [
            (image.path, why) for image, why in zip(rows.images, rows.errors, strict=True) if why is not None
        ]
        progress(len(rows.images))
    if not labels:
        raise InputError(
            f"{unreadable[0][0]}: {unreadable[0][1]}; none of {plural(len(unreadable), 'image')} can be read"
        )
    return torch.from_numpy(np.concatenate(features)), torch.tensor(labels)


def _scored(classifier: str, setting: float, votes: torch.Tensor, labels: torch.Tensor) -> Scores:
    """Return the accuracy by votes (N, K) for classes; a class without a vote is not among the first."""
    best = votes.topk(min(5, votes.shape[1]), dim=1)
    hits = (best.indices == labels[:, None]) & (best.values > 0)
    share = 100 / len(labels)
    return Scores(classifier, setting, share * int(hits[:, 0].sum()), share * int(hits.any(dim=1).sum()))
