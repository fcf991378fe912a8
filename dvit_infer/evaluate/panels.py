"""What a reduction left of an image, as panels: dropped patches dimmed, merged ones as regions."""

import numpy as np
from PIL import Image

NEUTRAL, OUTLINE = (224, 224, 224), (255, 255, 255)
DIM = 0.8  # share of NEUTRAL in a dropped patch


def dim_dropped(source: Image.Image, kept: np.ndarray) -> Image.Image:
    """Return the image with dropped patches blended to light grey; `kept` is (rows, columns) bool."""
    pixels = np.asarray(source)
    rows, columns = kept.shape
    patches = kept.repeat(source.height // rows, axis=0).repeat(source.width // columns, axis=1)
    dimmed = pixels * (1 - DIM) + np.array(NEUTRAL) * DIM
    return Image.fromarray(np.where(patches[..., None], pixels, dimmed.round()).astype(np.uint8))


def draw_regions(source: Image.Image, groups: np.ndarray) -> Image.Image:
    """Return the image with merged patches in their mean colour, and outlines between tokens, as in ToMe's paper.

    Patches that stand alone keep their pixels. `groups` (rows, columns) are equal for patches that one token holds.
    """
    rows, columns = groups.shape
    height, width = source.height // rows, source.width // columns
    tiles = np.asarray(source, np.float64).reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4).copy()
    labels, counts = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    labels = labels.reshape(rows, columns)
    means = np.zeros((len(counts), 3))
    np.add.at(means, labels, tiles.mean(axis=(2, 3)))
    merged = counts[labels] > 1
    tiles[merged] = (means / counts[:, None])[labels[merged]][:, None, None]
    pixels = tiles.transpose(0, 2, 1, 3, 4).reshape(source.height, source.width, 3).round().astype(np.uint8)
    apart = labels.repeat(height, axis=0).repeat(width, axis=1)
    pixels[_edges(apart, max(1, min(height, width) // 16))] = OUTLINE
    return Image.fromarray(pixels)


def _edges(labels: np.ndarray, width: int) -> np.ndarray:
    """Return (height, width) whether a pixel is left of or above one of another label, `width` pixels away at most."""
    edges = np.zeros(labels.shape, bool)
    for away in range(1, width + 1):
        edges[:, :-away] |= labels[:, :-away] != labels[:, away:]
        edges[:-away] |= labels[:-away] != labels[away:]
    return edges
