"""An engine in an actor of Ray: loaded once, called with batches of a dataset or with images that tasks decoded."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from dvit_infer.benchmark.results import machine_name
from dvit_infer.config import Config
from dvit_infer.evaluate.embedding_folder import Index
from dvit_infer.evaluate.open_model import open_model
from dvit_infer.evaluate.predictions import model_id
from dvit_infer.images.decoded import Decoded, decoded_bytes
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import batch_size, batches, running
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.serve.ray_decode import NO_IMAGE, Batch, Columns, check_image, column_of, rows_of
from dvit_infer.serve.ray_model import source_of
from dvit_infer.utils.packages import need

Out = TypeVar("Out")


@dataclass(frozen=True)
class Facts:
    """What a driver has to know of an engine on a cluster.

    Attributes:
        model: the `model_id`.
        batch: images that run together.
        config, precision, labels: as of the engine.
        runtime, machine: what runs it, and where.
        preprocess: how images are prepared.
        index: of what an `Embed` gives; None: of another.
    """

    model: str
    batch: int
    config: Config
    precision: str
    labels: dict[int, str] | None
    runtime: str
    machine: str
    preprocess: Preprocess
    index: Index | None = None


class OnEngine(ABC, Generic[Out]):
    """An engine in an actor: its weights are read once, and it takes as many threads as the actor has CPUs.

    Args:
        model: a path that the node can read, a name on the Hugging Face Hub, a state dict, or a reference in Ray's
            object store of one, of the bytes of a file, or of what `put` put there.
        column: of the images in a dataset; None: `bytes` or `image`.
        batch: images that run together; None: 256 on CUDA, 16 on a CPU.
        crop_pct: the share of the shorter side that the crop keeps; None: the model's.
        convert: arguments of `dvit.convert`.

    Raises:
        InputError: Ray is not installed, or the model or an argument cannot be used.
    """

    def __init__(
        self, model: Any, column: str | None, batch: int | None, crop_pct: float | None, convert: dict[str, Any]
    ) -> None:
        need("dvit.ray", "ray", extra="dvit-infer[ray]")
        self.column = column
        self._threads = use_assigned_cpus()
        with contextlib.ExitStack() as files:
            source = files.enter_context(source_of(model))
            self.engine = open_model(source, **convert)
            self.preprocess = preprocess_for(self.engine.config, crop_pct)
            self.batch = batch_size(batch, self.engine.device)
            self.id = model_id(self.engine, source, self.preprocess)
            self._files = files.pop_all()  # they stay: an engine may read its file again

    @property
    def facts(self) -> Facts:
        """What a driver has to know."""
        engine = self.engine
        return Facts(
            model=self.id,
            batch=self.batch,
            config=engine.config,
            precision=engine.precision,
            labels=None if engine.labels is None else dict(engine.labels),
            runtime=engine.runner.runtime,
            machine=machine_name(None),
            preprocess=self.preprocess,
        )

    def run(self, images: Sequence[Decoded]) -> list[Out]:
        """Return what the engine gives for each batch of the images.

        Raises:
            InputError: A batch does not fit in memory.
        """
        with running(self.batch):
            return [self._run(batch) for batch in batches(images, self.batch)]

    def __call__(self, batch: Batch) -> Columns:
        """Return the columns for a batch of rows of a dataset; `path` becomes `image`, other columns stay.

        Raises:
            InputError: There is no column of images, or the batch does not fit in memory.
        """
        column = column_of(batch, self.column)
        with ThreadPoolExecutor(self._threads) as pool:  # Pillow decodes without Python's lock
            images = list(pool.map(lambda row: self._decoded(*row), rows_of(batch, column)))
        rest = {name: values for name, values in batch.items() if name not in (column, "error")}
        if "path" in rest:
            rest["image"] = rest.pop("path")
        return rest | self._columns(self.run(images))

    @abstractmethod
    def _run(self, batch: Sequence[Decoded]) -> Out: ...

    @abstractmethod
    def _columns(self, outputs: Sequence[Out]) -> Columns: ...

    def _decoded(self, name: str, value: Any, why: str | None) -> Decoded:
        if why is None and isinstance(value, bytes):
            return decoded_bytes(name, value, self.preprocess)
        pixels, why = (None, why) if why is not None else self._prepared(value)
        return Decoded(name, None, pixels, why, 0.0)

    def _prepared(self, image: Any) -> tuple[np.ndarray | None, str | None]:
        """Return an image (H, W, 3) as (3, H, W), or why the model cannot take it."""
        if image is None:
            return None, NO_IMAGE
        check_image(image)
        found, taken = (f"{height}x{width}" for height, width in (image.shape[:2], self.preprocess.image_size))
        if found != taken:
            return None, f"is {found}; the model takes {taken}, and dvit.ray.Decode prepares images of any size"
        return np.ascontiguousarray(image.transpose(2, 0, 1)), None


def use_assigned_cpus() -> int:
    """Let PyTorch take as many threads as the actor that this runs in has CPUs; return its number of threads."""
    import ray

    if ray.is_initialized() and (context := ray.get_runtime_context()).get_actor_id() is not None:
        cpus = int(context.get_assigned_resources().get("CPU", 0))
        if cpus:
            torch.set_num_threads(cpus)
    return torch.get_num_threads()
