"""A model that is served: its engine behind a batcher, and what images and answers are."""

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dvit_infer.backends.captured import BUCKETS
from dvit_infer.classifier import Classifier
from dvit_infer.errors import InputError
from dvit_infer.evaluate.predictions import Prediction, model_id, predictions_of
from dvit_infer.images.decode import open_bytes
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.models.checkpoint import Source
from dvit_infer.serve.batcher import Batcher, Meter
from dvit_infer.serve.settings import Settings

_TURNS = threading.Lock()  # the models of a process take turns: each uses all threads that it may, or the whole GPU
_SUFFIXES = (".dvit.safetensors", ".safetensors", ".pth.tar", ".pth", ".pt", ".bin", ".npz", ".dvit.onnx", ".onnx")


class Model:
    """A loaded model.

    Args:
        name: in URLs and metrics.
        source: of which the engine was made.
        labels: class names, if known.
        meter: is told of its queue and batches.

    Attributes:
        id: `model_id`, which predictions name.
        width: K of its output (B, K), known once it has started.
        batcher: runs the engine.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        engine: Classifier,
        preprocess: Preprocess,
        labels: Mapping[int, str] | None,
        settings: Settings,
        meter: Meter,
    ) -> None:
        self.name, self.engine, self.preprocess, self.labels = name, engine, preprocess, labels
        self.id, self.width = model_id(engine, source, preprocess), 0
        self._max_pixels = settings.max_pixels
        # The engine would split a larger batch; the first images would only wait for the others.
        self._full = min(settings.max_batch, engine.micro_batch)
        self.batcher = Batcher(
            self._run, settings.max_batch, self._full, settings.max_delay_ms / 1e3, settings.places, meter
        )

    def start(self) -> None:
        """Start the batcher, and return when the engine is warm.

        Raises:
            MemoryError: Not one image fits in memory.
        """
        self.batcher.start(self._warm_up)

    @property
    def output(self) -> str:
        """The name of the output tensor."""
        return "logits" if self.engine.config.num_classes else "features"

    def decode(self, content: bytes, name: str) -> np.ndarray:
        """Return an image file as (1, 3, H, W) uint8, as the model sees it.

        Raises:
            ImageFileError: It is no image, or is damaged or too large.
        """
        return self.preprocess(open_bytes(name, content, self._max_pixels))[None]

    def prediction(self, name: str, logits: np.ndarray) -> Prediction:
        """Return the prediction for an image from its output (1, K)."""
        return next(predictions_of(torch.from_numpy(logits), [name], self.engine.precision))

    def line(self, prediction: Prediction) -> str:
        """Return the prediction as dvit-predict prints it."""
        return prediction.line(self.id, self.labels)

    def _run(self, images: np.ndarray) -> np.ndarray:
        with _TURNS:
            logits: np.ndarray = self.engine(torch.from_numpy(images)).cpu().numpy()
        return logits

    def _warm_up(self) -> None:
        """Run the batch sizes that engines are prepared for one by one, up to the largest that runs at once."""
        sizes = [*(size for size in BUCKETS if size < self._full), self._full]
        self.engine.warm_up(sizes, uint8=True)
        if self.engine.device.type != "cpu" and not self.engine.only_uint8:  # CPUs normalise before the graph
            self.engine.warm_up(sizes)
        self.width = self._run(np.zeros((1, 3, *self.engine.config.image_size), np.uint8)).shape[1]


def named(arguments: Sequence[str]) -> dict[str, str]:
    """Return MODEL arguments by the names under which they are served: NAME=FILE, else the file's without suffix.

    Raises:
        InputError: Two have the same name, or one has a name that a URL cannot have.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        name, equals, source = argument.partition("=")
        if not equals or Path(argument).exists():
            name, source = Path(argument).name, argument
            name = next((name.removesuffix(end) for end in _SUFFIXES if name.lower().endswith(end)), name)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise InputError(f"model: {argument}: {name!r} cannot be a name in a URL; give one: NAME={source}")
        if name in models:
            raise InputError(f"model: {models[name]} and {source} are both named {name}; give one another: NAME=FILE")
        models[name] = source
    return models
