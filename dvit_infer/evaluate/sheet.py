"""A sheet of panels with text, and the colours of a heat map."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dvit_infer.config import Config

PANEL_WIDTH = 160  # minimum in pixels; smaller images are enlarged by an integer factor
GROUND, INK = (255, 255, 255), (32, 36, 42)
# Viridis (van der Walt and Smith 2015): lightness grows with the share, also in greyscale and for the colour-blind.
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def viridis(shares: np.ndarray) -> np.ndarray:
    """Map shares from 0 to 1 to colours, (..., 3) uint8."""
    stops = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(shares, stops, channel) for channel in zip(*VIRIDIS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


class Sheet:
    """Rows of equal panels, with a line of text above each panel and under each row."""

    def __init__(self, config: Config, panels: int, rows: int, legend: bool = False) -> None:
        height, width = config.image_size
        scale = -(-PANEL_WIDTH // width)
        self.width, self.height = width * scale, height * scale
        size = max(12, self.width // 16)
        self._font = ImageFont.load_default(size)
        self.gap, self.line = size // 2, size * 3 // 2
        self.row_height = self.height + 2 * self.line + size
        across = self.gap + panels * (self.width + self.gap)
        down = self.gap + rows * self.row_height + (2 * self.line + self.gap if legend else 0)
        self.image = Image.new("RGB", (across, down), GROUND)
        self._draw = ImageDraw.Draw(self.image)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return (x, y) of a panel's top left pixel."""
        return self.gap + column * (self.width + self.gap), self.gap + row * self.row_height + self.line

    def place(self, row: int, column: int, panel: Image.Image, caption: str) -> None:
        x, y = self.corner(row, column)
        self.image.paste(panel.resize((self.width, self.height), Image.Resampling.NEAREST), (x, y))
        self._write(x, y - self.line // 2, caption, "", self.width)

    def write_under(self, row: int, text: str, end: str = "") -> None:
        """Write text under a row; text that is too long is cut before `end`."""
        x, y = self.corner(row, 0)
        self._write(x, y + self.height + self.line // 2, text, end, self.image.width - 2 * self.gap)

    def draw_legend(self) -> None:
        """Draw a colour bar from 0% to 100% at the bottom."""
        left, width = self.gap, min(self.image.width - 2 * self.gap, 2 * PANEL_WIDTH)
        top = self.image.height - self.gap - 2 * self.line
        bar = np.broadcast_to(viridis(np.linspace(0, 1, width)), (self.line, width, 3))
        self.image.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, top))
        for share, anchor in ((0.0, "lm"), (0.5, "mm"), (1.0, "rm")):
            at = left + round(share * width), top + self.line * 3 // 2
            self._draw.text(at, f"{share:.0%}", INK, self._font, anchor=anchor)

    def _write(self, x: int, middle: int, text: str, end: str, width: int) -> None:
        text = "".join(c if c.isprintable() else "?" for c in text)[:300]
        if self._draw.textlength(text + end, self._font) > width:
            while text and self._draw.textlength(f"{text}...{end}", self._font) > width:
                text = text[:-1]
            text += "..."
        self._draw.text((x, middle), text + end, INK, self._font, anchor="lm")
