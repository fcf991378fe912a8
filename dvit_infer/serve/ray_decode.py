"""Decoding as a stage of its own in a dataset of Ray: its processes load no torch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvit_infer.errors import InputError
from dvit_infer.images.decoded import Decoded, decoded, decoded_bytes
from dvit_infer.images.entry import Entry
from dvit_infer.images.preprocess import Preprocess

COLUMNS = ("bytes", "image")  # of images, by default: what Ray's read_binary_files and read_images give
NO_IMAGE = "there is no image"
Batch = Mapping[str, Any]
Columns = dict[str, Any]


class Decode:
    """Prepares images for a model: `ds.map_batches(dvit.ray.Decode("model.safetensors"))`, before `Classify`.

    Takes a column of bytes of image files, or of uint8 images (H, W, 3) of any size. Returns the column `image`, uint8
    (N, H, W, 3) as the model sees them, and `error`: why an image cannot be read, which then is black; else None. Other
    columns stay. What the model needs is read once, on the driver; tasks carry that alone.

    Args:
        model: path of the model, or how its images are prepared.
        column: of the images; None: `bytes` or `image`.
        crop_pct: the share of the shorter side that the crop keeps; None: the model's.
        convert: arguments of `dvit.convert`, of which some say how images are prepared.

    Raises:
        InputError: The model or an argument cannot be used.
    """

    def __init__(
        self,
        model: str | Path | Preprocess,
        *,
        column: str | None = None,
        crop_pct: float | None = None,
        **convert: Any,
    ) -> None:
        self.column = column
        self.preprocess = model if isinstance(model, Preprocess) else _preprocess_of(model, crop_pct, convert)

    def __call__(self, batch: Batch) -> Columns:
        """Return the columns for a batch of rows.

        Raises:
            InputError: There is no column of images.
        """
        column = column_of(batch, self.column)
        found = [self._one(name, value) for name, value, _ in rows_of(batch, column)]
        images = np.zeros((len(found), *self.preprocess.image_size, 3), np.uint8)
        for row, one in zip(images, found, strict=True):
            if one.pixels is not None:
                row[:] = one.pixels.transpose(1, 2, 0)
        rest = {name: values for name, values in batch.items() if name != column}
        return {**rest, "image": images, "error": objects([one.error for one in found])}

    def _one(self, name: str, value: Any) -> Decoded:
        if value is None:
            return Decoded(name, None, None, NO_IMAGE, 0.0)
        if isinstance(value, bytes):
            return decoded_bytes(name, value, self.preprocess)
        check_image(value)
        return decoded(Entry(name), self.preprocess, lambda entry: Image.fromarray(value))


def _preprocess_of(model: str | Path, crop_pct: float | None, convert: dict[str, Any]) -> Preprocess:
    from dvit_infer.models.preprocessing import preprocess_for
    from dvit_infer.models.recognised import recognised
    from dvit_infer.onnx.engine import is_onnx, load_onnx

    known = ("arch", "keep_rate", "prune_at", "method", "merge", "image_size", "assume")
    given = {name: value for name, value in convert.items() if name in known}
    config = load_onnx(model, device="cpu").config if is_onnx(model) else recognised(model, **given)[1]
    return preprocess_for(config, crop_pct)


def column_of(batch: Batch, column: str | None) -> str:
    """Return the name of the column of images.

    Raises:
        InputError: There is none.
    """
    found = next((name for name in (COLUMNS if column is None else (column,)) if name in batch), None)
    if found is None:
        expected = " or ".join(COLUMNS if column is None else (column,))
        raise InputError(f"column: {expected} is expected, of image files or images; there are {', '.join(batch)}")
    return found


def rows_of(batch: Batch, column: str) -> Iterator[tuple[str, Any, str | None]]:
    """Yield the name of each image, the image or file, and the error that an earlier stage had with it."""
    values = batch[column]
    names: Sequence[Any] = batch.get("path", [""] * len(values))
    errors: Sequence[Any] = batch.get("error", [None] * len(values))
    for name, value, why in zip(names, values, errors, strict=True):
        yield str(name), bytes(value) if isinstance(value, memoryview | bytearray) else value, why or None


def check_image(value: Any) -> None:
    """Raise InputError unless a value is an image, uint8 (H, W, 3)."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        is_array = isinstance(value, np.ndarray)
        found = f"{value.dtype} of shape {value.shape}" if is_array else f"a value of type {type(value).__name__}"
        raise InputError(f"column: {found}; the bytes of an image file, or uint8 of shape (H, W, 3), is expected")


def objects(values: Sequence[Any]) -> np.ndarray:
    """Return a column of any values, lists of one length too."""
    column = np.empty(len(values), object)
    for row, value in enumerate(values):
        column[row] = value
    return column
