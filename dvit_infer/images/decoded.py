"""Images that were read and prepared for a model. A process that only decodes imports this: it loads no torch."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dvit_infer.images.archives import read_member
from dvit_infer.images.decode import ImageFileError, open_bytes, open_image
from dvit_infer.images.entry import Entry
from dvit_infer.images.preprocess import Preprocess


@dataclass(frozen=True)
class Decoded:
    """A decoded image, (3, H, W) uint8, or the reason why it cannot be read; and the decoding time in seconds."""

    path: str
    label: int | None
    pixels: np.ndarray | None
    error: str | None
    seconds: float


def decoded(entry: Entry, preprocess: Preprocess, opened: Callable[[Entry], Image.Image] | None = None) -> Decoded:
    """Read an image and prepare it.

    Args:
        entry: the image.
        preprocess: resizes and crops.
        opened: reads it; None: from its file or archive.
    """
    start = time.perf_counter()
    pixels, why = None, entry.error
    try:
        if why is None:
            pixels = preprocess((opened or _opened)(entry))
    except ImageFileError as error:
        why = error.why
    return Decoded(entry.path, entry.label, pixels, why, time.perf_counter() - start)


def decoded_bytes(path: str, content: bytes, preprocess: Preprocess) -> Decoded:
    """Read an image from the bytes of its file and prepare it; `path` is its name."""
    return decoded(Entry(path), preprocess, lambda entry: open_bytes(entry.path, content))


def decoded_elsewhere(entries: Sequence[Entry], preprocess: Preprocess, folder: str) -> list[Decoded]:
    """Read images and prepare them in a process with another working directory.

    Args:
        entries: the images; their names stay as they are.
        preprocess: resizes and crops.
        folder: to which relative paths relate.
    """
    return [replace(decoded(_below(folder, entry), preprocess), path=entry.path) for entry in entries]


def _below(folder: str, entry: Entry) -> Entry:
    member = entry.member and replace(entry.member, archive=os.path.join(folder, entry.member.archive))
    return replace(entry, path=os.path.join(folder, entry.path), member=member)


def _opened(entry: Entry) -> Image.Image:
    if entry.member is None:
        return open_image(entry.path)
    return open_bytes(entry.path, read_member(entry.path, entry.member))
