"""Images for the tests of what reads images: drawn, odd and damaged ones."""

from pathlib import Path

import numpy as np
from PIL import Image

SMALL = ["--image-size", "64", "--workers", "0"]


def draw(seed: int, width: int = 60, height: int = 45) -> Image.Image:
    """RGB, smooth, another one for every seed."""
    blobs = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def draw_all(folder: Path, count: int, first_seed: int = 0) -> list[str]:
    """Write `count` images of several sizes and formats; their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(first_seed, first_seed + count):
        path = folder / f"{seed:03}.{('png', 'jpg', 'webp')[seed % 3]}"
        draw(seed, 50 + 7 * (seed % 5), 40 + 11 * (seed % 4)).save(path)
        paths.append(str(path))
    return paths


def write_text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("this is no image\n")
    return path


def write_cut(path: Path) -> Path:
    """A JPEG that ends in its middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(1, 300, 200).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path
