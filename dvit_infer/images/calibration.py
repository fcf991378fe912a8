"""Calibration images: a sample of a folder, drawn with a fixed seed."""

import heapq
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from dvit_infer.errors import InputError
from dvit_infer.images.entry import Entry
from dvit_infer.images.find import find_images
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import batches, decode, pixels

CALIBRATE_WITH, AT_ONCE = 128, 16  # images in all, and in a batch


def calibration_images(
    folder: str | Path, preprocess: Preprocess, count: int = CALIBRATE_WITH
) -> Iterator[torch.Tensor]:
    """Yield batches (B, 3, H, W) uint8 of images drawn uniformly (with a fixed seed) from a folder.

    Args:
        folder: a folder with images at any depth; unreadable ones are skipped.
        preprocess: that of the model.
        count: the largest number of images.

    Raises:
        InputError: the folder does not exist or has no image; or, during iteration, none that can be read.
    """
    try:
        found = find_images([str(folder)])
    except InputError as error:
        raise InputError(f"calibrate: {error}") from None
    return _batches(folder, found, preprocess, count)


def _batches(folder: str | Path, found: Iterator[str], preprocess: Preprocess, count: int) -> Iterator[torch.Tensor]:
    chance = random.Random(0)
    # Not the first paths: they would be of one class folder.
    paths = heapq.nsmallest(count, found, key=lambda path: chance.random())
    readable = False
    for batch in batches(decode(map(Entry, paths), preprocess, workers=0), AT_ONCE):
        images = pixels(batch)
        if images is not None:
            readable = True
            yield images
    if not readable:
        raise InputError(f"calibrate: {folder}: none of {len(paths)} images can be read")
