"""Draw class folders of simple shapes on noise, for demonstrations: python examples/draw_images.py FOLDER [COUNT]"""

import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIDES = {"circle": 60, "square": 4, "triangle": 3}
WIDTH, HEIGHT = 320, 256


def draw(sides: int, seed: int) -> Image.Image:
    """Draw a shape of one colour at a random place on blurred noise."""
    chance = random.Random(seed)
    small = Image.frombytes("RGB", (40, 32), chance.randbytes(40 * 32 * 3))
    image = small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(4))
    x, y = chance.uniform(100, WIDTH - 100), chance.uniform(90, HEIGHT - 90)
    radius, turn = chance.uniform(40, 80), chance.uniform(0, 2 * math.pi)
    angles = [turn + 2 * math.pi * side / sides for side in range(sides)]
    corners = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
    color = tuple(chance.choice((30, 130, 230)) for _ in range(3))
    ImageDraw.Draw(image).polygon(corners, fill=color)
    return image


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 8
    for place, (name, sides) in enumerate(SIDES.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            draw(sides, 1000 * place + number).save(folder / name / f"{number:03}.jpg", quality=90)
    print(f"drew {count * len(SIDES)} images in {len(SIDES)} class folders of {folder}")
