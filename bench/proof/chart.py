"""A chart of a few lines as an image, by Pillow alone."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, RIGHT, TOP, BOTTOM = (880, 480), 70, 150, 20, 60
COLORS = ("#0072b2", "#009e73", "#d55e00", "#7d7d7d", "#e69f00", "#cc79a7")  # Okabe and Ito's
TICKS = 5


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, lowest: float
) -> Image.Image:
    """Draw named lines of (x, y) with a legend; a y below `lowest` is a hollow mark at the bottom, with its value."""
    points = [point for line in lines.values() for point in line]
    x0, x1 = _span([x for x, _ in points])
    y0, y1 = _span([lowest, *(y for _, y in points if y > lowest)])
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * width, TOP + (y1 - max(y, lowest)) / (y1 - y0) * height

    image = Image.new("RGB", SIZE, "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for i in range(TICKS + 1):
        x, y = x0 + (x1 - x0) * i / TICKS, lowest + (y1 - lowest) * i / TICKS
        canvas.line([at(x, y1)[0], TOP, at(x, y1)[0], TOP + height], "#e3e6ea")
        canvas.line([LEFT, at(x0, y)[1], LEFT + width, at(x0, y)[1]], "#e3e6ea")
        canvas.text((at(x, y1)[0], SIZE[1] - BOTTOM + 8), f"{x:.1f}", "#57606a", font, anchor="ma")
        canvas.text((LEFT - 8, at(x0, y)[1]), f"{y:.1f}", "#57606a", font, anchor="rm")
    canvas.text((LEFT + width / 2, SIZE[1] - 10), xlabel, "#1c2128", font, anchor="ms")
    canvas.text((LEFT + 8, TOP + 4), ylabel, "#1c2128", font)
    for i, ((name, line), color) in enumerate(zip(lines.items(), COLORS, strict=False)):
        shown = [at(*point) for point in line if point[1] > lowest]
        if len(shown) > 1:
            canvas.line(shown, color, 3)
        for x, y in line:
            left, top = at(x, y)
            box = [left - 5, top - 5, left + 5, top + 5]
            canvas.ellipse(box, color if y > lowest else "white", color, 2)
            if y <= lowest:
                canvas.text((left, top + 8), f"{y:.1f}", color, font, anchor="ma")
        top = TOP + 24 + 24 * i
        canvas.ellipse([SIZE[0] - RIGHT + 20, top - 5, SIZE[0] - RIGHT + 30, top + 5], color)
        canvas.text((SIZE[0] - RIGHT + 40, top), name, color, font, anchor="lm")
    return image


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin
