"""Measure points of one model: answers against the dense model's, and time beside it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn import functional as F

from dvit_infer.benchmark.timing import Timing, interleave
from dvit_infer.config import Config
from dvit_infer.engine import Engine
from dvit_infer.evaluate.one_logit import as_classes
from dvit_infer.images.stream import running
from dvit_infer.images.tensors import normalise
from dvit_infer.tuning.points import Point
from dvit_infer.tuning.quality import Metric, Tally
from dvit_infer.tuning.sample import Sample
from dvit_infer.utils.devices import timed

PAIRS, MOST_PAIRS, PAIRS_S = 3, 15, 1.5  # calls of each in a rough comparison: the least, the most; and their seconds

# Makes the engine of a config; `to_run` with the backend that will run it, else with one that answers the same sooner.
Make = Callable[[Config, bool], Engine]


class Measure:
    """The `Evaluate` of a model. Engines are made when they are needed and not kept.

    Attributes:
        dense: the dense model.

    Args:
        make: makes engines.
        dense: the dense model, with the backend that runs it.
        points: the points by name; it may grow.
        sample: the images.
        metric: what is measured.
        batch: images at a time.
        tick: called after each batch.
    """

    def __init__(
        self,
        make: Make,
        dense: Engine,
        points: Mapping[str, Point],
        sample: Sample,
        metric: Metric,
        batch: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._make, self._points, self._sample, self._metric = make, points, sample, metric
        self._batch, self._tick = batch, tick
        self.dense = dense
        self._answers: dict[bool, torch.Tensor] = {}  # of the dense model: on images held back, on searched ones
        self._timed_on = self._timing_images(dense.config)

    def engine(self, name: str) -> Engine:
        """Return the engine of a point as it will run."""
        return self._make(self._points[name].config, True)

    def dense_answers(self, held_back: bool) -> torch.Tensor:
        """Return the dense model's: classes (n,), features (n, D), or whether they are right, (n,) bool."""
        if held_back not in self._answers:
            config = self.dense.config
            engine = self.dense if held_back else self._make(config, False)
            self._answers[held_back] = torch.cat(list(self._each(engine, held_back)))
        return self._answers[held_back]

    def losses(self, name: str) -> Iterator[Sequence[float]]:
        yield from self._losses(self._make(self._points[name].config, False), held_back=False)

    def held_back(self, engine: Engine) -> Tally:
        """Return the tally of an engine on the images that no search has seen."""
        tally = Tally(complete=True)
        for losses in self._losses(engine, held_back=True):
            tally.add(losses)
        return tally

    def relative_time(self, name: str) -> float:
        """Return the median ratio of a few calls, one of each in turn."""
        engine = self.engine(name)
        ratios = []
        with running(self._batch), torch.no_grad():
            start = time.monotonic()
            for call in range(MOST_PAIRS + 1):
                if call > PAIRS and time.monotonic() - start > PAIRS_S:
                    break
                mine = timed(lambda: engine(self._timed_on), engine.device)[1]
                dense = timed(lambda: self.dense(self._timed_on), engine.device)[1]
                self._tick()
                if call:  # the first one selects kernels or captures a graph
                    ratios.append(mine / dense)
        return sorted(ratios)[len(ratios) // 2]

    def time(self, engines: Mapping[str, Engine], seconds: float) -> dict[str, Timing]:
        """Time engines by name, and the dense one as "", interleaved, for about `seconds`."""
        calls = {
            name: (lambda engine=engine: engine(self._timed_on)) for name, engine in {"": self.dense, **engines}.items()
        }
        with running(self._batch), torch.no_grad():
            return interleave(calls, self.dense.device, seconds, lambda share: self._tick())

    def _timing_images(self, config: Config) -> torch.Tensor:
        """Return one batch, normalised, on the device; with fewer images some are there several times."""
        images = self._sample.images
        images = images[torch.arange(self._batch) % len(images)]
        if images.dtype == torch.uint8:
            images = normalise(images, config.mean, config.std)
        return images.to(self.dense.device)

    def _each(self, engine: Engine, held_back: bool) -> Iterator[torch.Tensor]:
        """Yield the answers of an engine, batch by batch."""
        for images, labels in self._batches(held_back):
            yield self._answer(engine, images, labels)
            self._tick()

    def _answer(self, engine: Engine, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        with running(len(images)):
            if self._metric == "cosine":
                return engine.features(images).float().cpu()
            logits = as_classes(engine(images).float().cpu())
        classes = logits.argmax(dim=1)
        classes[~torch.isfinite(logits).all(dim=1)] = -1  # no answer
        if labels is None:
            return classes
        return classes == labels

    def _batches(self, held_back: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        sample = self._sample
        start, end = (sample.searched, len(sample.images)) if held_back else (0, sample.searched)
        for first in range(start, end, self._batch):
            part = slice(first, min(first + self._batch, end))
            needed = sample.labels if self._metric == "top1" else None
            yield sample.images[part], None if needed is None else needed[part]

    def _losses(self, engine: Engine, held_back: bool) -> Iterator[list[float]]:
        start = 0
        expected = self.dense_answers(held_back)
        for found in self._each(engine, held_back):
            want = expected[start : start + len(found)]
            start += len(found)
            yield _loss(self._metric, found, want).tolist()


def _loss(metric: Metric, found: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return the loss of each image, (B,); see `quality.Goal`."""
    if metric == "cosine":
        return (1 - F.cosine_similarity(found, want, dim=1)).nan_to_num(nan=1.0).clamp(0, 2)
    if metric == "top1":
        return want.float() - found.float()
    return ((found != want) | (found < 0)).float()
