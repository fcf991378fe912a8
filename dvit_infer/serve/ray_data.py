"""Engines for Ray Data: callables for `Dataset.map_batches` (`dvit.ray`)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dvit_infer.evaluate.embed import index_of
from dvit_infer.evaluate.features import Embedder, Rows
from dvit_infer.evaluate.one_logit import check_classes
from dvit_infer.evaluate.predictions import Prediction, classify
from dvit_infer.images.decoded import Decoded
from dvit_infer.serve.ray_decode import Columns, objects
from dvit_infer.serve.ray_decode import Decode as Decode
from dvit_infer.serve.ray_engine import Facts, OnEngine
from dvit_infer.serve.ray_model import put as put


class Classify(OnEngine[list[Prediction]]):
    """Classifies images: `ds.map_batches(dvit.ray.Classify, fn_constructor_args=(model,), num_cpus=2, concurrency=4)`.

    Takes a column of bytes of image files, or of uint8 images (H, W, 3) of the model's size (`Decode` prepares them).
    Returns the columns of dvit-predict's lines: `image` (if there is a column `path`), `model`, `top5`, with `kept`
    `kept`, and `error`: why an image has no `top5`, else None.

    Args:
        model, column, batch, crop_pct, convert: as for `OnEngine`.
        kept: also return the patches that every stage kept.

    Raises:
        InputError: The model or an argument cannot be used, or the model has no classifier.
    """

    def __init__(
        self,
        model: Any,
        *,
        kept: bool = False,
        column: str | None = None,
        batch: int | None = None,
        crop_pct: float | None = None,
        **convert: Any,
    ) -> None:
        super().__init__(model, column, batch, crop_pct, convert)
        check_classes(self.engine.config, "model")
        self.kept = kept

    def _run(self, batch: Sequence[Decoded]) -> list[Prediction]:
        return classify(self.engine, batch, self.kept)

    def _columns(self, outputs: Sequence[list[Prediction]]) -> Columns:
        records = [one.record(self.id, self.engine.labels) for predictions in outputs for one in predictions]
        names = ("model", "top5", *(["kept"] if self.kept else []), "error")
        return {name: objects([record.get(name) for record in records]) for name in names}


class Embed(OnEngine[Rows]):
    """Computes features of the images of a dataset, as `Classify` takes them.

    Returns the columns `image` (if there is a column `path`), `features`, (N, D) float32, which are NaN for an image
    without any, and `error`: why it has none, else None.

    Args:
        model, column, batch, crop_pct, convert: as for `OnEngine`.
        pool, normalize: as for `dvit.embed`.

    Raises:
        InputError: The model or an argument cannot be used.
    """

    def __init__(
        self,
        model: Any,
        *,
        pool: str = "own",
        normalize: bool = False,
        column: str | None = None,
        batch: int | None = None,
        crop_pct: float | None = None,
        **convert: Any,
    ) -> None:
        super().__init__(model, column, batch, crop_pct, convert)
        self._embedder = Embedder(self.engine, self.batch, pool, normalize, self.preprocess, workers=0)

    @property
    def facts(self) -> Facts:
        """What a driver has to know, with the index of a folder of rows."""
        return replace(super().facts, index=index_of(self._embedder, "float32"))

    def _run(self, batch: Sequence[Decoded]) -> Rows:
        rows = self._embedder.rows(batch)
        return rows._replace(images=[replace(image, pixels=None) for image in batch])

    def _columns(self, outputs: Sequence[Rows]) -> Columns:
        errors = [why for rows in outputs for why in rows.errors]
        return {"features": np.concatenate([rows.features for rows in outputs]), "error": objects(errors)}
