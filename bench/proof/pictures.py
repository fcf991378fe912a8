"""Write the test images as class folders: python bench/proof/pictures.py FOLDER [COUNT], all 10,000 by default."""

import shutil
import sys
from pathlib import Path

import numpy as np
from cluttered_digits import test_set
from PIL import Image


def write(folder: Path, pictures: np.ndarray, labels: np.ndarray) -> None:
    """Write images (n, 3, H, W) uint8 of classes (n,) losslessly as PNG files; the whole folder or none."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for label in range(10):
        (part / str(label)).mkdir(parents=True)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(part / str(label) / f"{i:05}.png", compress_level=1)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(count.isdigit() for count in sys.argv[2:]):
        sys.exit(__doc__)
    count = int(sys.argv[2]) if len(sys.argv) == 3 else None
    drawn, classes = test_set()
    write(Path(sys.argv[1]), drawn[:count], classes[:count])
