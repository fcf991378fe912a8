"""A chart of a few lines as an image, by Pillow alone."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, RIGHT, TOP, BOTTOM = (880, 480), 70, 150, 20, 60
COLORS = ("#0072b2", "#009e73", "#d55e00", "#7d7d7d", "#e69f00", "#cc79a7")  # Okabe and Ito's
TICKS = 5


def draw_lines(lines: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> Image.Image:
    """Draw named lines of (x, y), each with its name at the right end; a single point is a mark."""
    points = [point for line in lines.values() for point in line]
    (x0, x1), (y0, y1) = (_span([point[axis] for point in points]) for axis in (0, 1))
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * width, TOP + (y1 - y) / (y1 - y0) * height

    image = Image.new("RGB", SIZE, "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for i in range(TICKS + 1):
        x, y = x0 + (x1 - x0) * i / TICKS, y0 + (y1 - y0) * i / TICKS
        canvas.line([at(x, y0), at(x, y1)], "#e3e6ea")
        canvas.line([at(x0, y), at(x1, y)], "#e3e6ea")
        canvas.text((at(x, y0)[0], SIZE[1] - BOTTOM + 8), f"{x:.1f}", "#57606a", font, anchor="ma")
        canvas.text((LEFT - 8, at(x0, y)[1]), f"{y:.1f}", "#57606a", font, anchor="rm")
    canvas.text((LEFT + width / 2, SIZE[1] - 10), xlabel, "#1c2128", font, anchor="ms")
    canvas.text((LEFT + 8, TOP + 4), ylabel, "#1c2128", font)
    ends: list[float] = []
    for (name, line), color in zip(lines.items(), COLORS, strict=False):
        places = [at(*point) for point in line]
        if len(places) > 1:
            canvas.line(places, color, 3)
        for x, y in places:
            canvas.ellipse([x - 5, y - 5, x + 5, y + 5], color)
        label = places[-1][1]
        while any(abs(label - end) < 18 for end in ends):
            label += 6
        ends.append(label)
        canvas.text((places[-1][0] + 12, label), name, color, font, anchor="lm")
    return image


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin
