"""Draw the patches that a model keeps: stage by stage for a few images, as a heat map for many."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dvit_infer.classifier import Classifier
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.evaluate.one_logit import as_classes
from dvit_infer.images.decode import ImageFileError, open_image
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.models.preprocessing import preprocess_for

ImageSource = Image.Image | str | Path

BATCH = 16  # images at a time
PANEL_WIDTH = 160  # minimum in pixels; smaller images are enlarged by an integer factor
GROUND, INK, NEUTRAL = (255, 255, 255), (32, 36, 42), (224, 224, 224)
DIM = 0.8  # share of NEUTRAL in a dropped patch
# Viridis (van der Walt and Smith 2015): lightness grows with the share, also in greyscale and for the colour-blind.
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Seen:
    """An image with the engine's prediction and kept patches.

    Attributes:
        source: the image as the model sees it, (H, W) pixels of its `image_size`.
        label, probability: the most likely class; None: the model has no classifier, as the label says.
        kept: for each stage, (rows, columns) bool over the patch grid.
    """

    source: Image.Image
    label: str
    probability: float | None
    kept: tuple[np.ndarray, ...]

    @property
    def share(self) -> str:
        """The probability as text that follows the label."""
        return "" if self.probability is None else f" {self.probability:.1%}"


def draw_kept(
    engine: Classifier,
    sources: Sequence[ImageSource],
    labels: Mapping[int, str] | None = None,
    preprocess: Preprocess | None = None,
) -> Image.Image:
    """Draw a row for each image: the model's input with its prediction, then each stage with dropped patches dimmed.

    Args:
        engine: a model that drops tokens.
        sources: PIL images or paths, at least one.
        labels: class names; a class without one is called e.g. "class 7".
        preprocess: resizing and cropping; None: as the model's family is evaluated.

    Raises:
        InputError: An image cannot be read, the model drops no tokens, or there are no images.
    """
    return draw_seen(look(engine, _batches(engine, sources, preprocess), labels), engine.config)


def draw_heat_map(
    engine: Classifier, sources: Iterable[ImageSource], preprocess: Preprocess | None = None
) -> Image.Image:
    """Draw the share of images that kept each patch, one panel per stage, with a legend.

    The images may be a stream: memory does not grow with their number. Arguments and errors as `draw_kept`.
    """
    shares, count = keep_shares(engine, _batches(engine, sources, preprocess))
    return draw_shares(shares, count, engine.config)


def look(engine: Classifier, batches: Iterable[torch.Tensor], labels: Mapping[int, str] | None = None) -> list[Seen]:
    """Run the engine on each image.

    Args:
        engine: a model that drops tokens.
        batches: images in the engine's size, (B, 3, H, W) uint8.
        labels: as `draw_kept`.

    Raises:
        InputError: The model drops no tokens, or there are no images.
    """
    config = engine.config
    check_drops(config)
    seen: list[Seen] = []
    for images in batches:
        logits, kept = engine(images, return_kept=True)
        probabilities, classes = (found.tolist() for found in as_classes(logits).softmax(dim=1).max(dim=1))
        stages = [_mask(stage, config) for stage in kept]
        for place, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
            if math.isnan(probabilities[place]):
                raise InputError(f"dtype: in {engine.precision} the model's output has NaN or Inf")
            named = (labels or {}).get(classes[place], f"class {classes[place]}"), probabilities[place]
            label, probability = named if config.num_classes else ("no classifier", None)
            masks = tuple(stage[place] for stage in stages)
            seen.append(Seen(Image.fromarray(pixels), label, probability, masks))
    if not seen:
        raise InputError("images: there are none")
    return seen


def keep_shares(engine: Classifier, batches: Iterable[torch.Tensor]) -> tuple[np.ndarray, int]:
    """Measure how often each patch is kept.

    Args:
        engine: a model that drops tokens.
        batches: images in the engine's size, (B, 3, H, W).

    Returns:
        (stages, rows, columns) float64, the share of images that kept the patch, and the number of images.

    Raises:
        InputError: The model drops no tokens, or there are no images.
    """
    config = engine.config
    check_drops(config)
    sums = np.zeros((len(config.num_keep), *config.grid), np.int64)
    count = 0
    for images in batches:
        _, kept = engine(images, return_kept=True)
        sums += np.stack([_mask(stage, config).sum(axis=0) for stage in kept])
        count += len(images)
    if not count:
        raise InputError("images: there are none")
    return sums / count, count


def check_drops(config: Config) -> None:
    """Raise InputError unless the model drops tokens."""
    if not config.num_keep:
        raise InputError(f"method: none, so {config.arch} keeps every patch and there is nothing to draw")


def _batches(
    engine: Classifier, sources: Iterable[ImageSource], preprocess: Preprocess | None
) -> Iterator[torch.Tensor]:
    """Yield (B, 3, H, W) uint8, `BATCH` images at a time."""
    preprocess = preprocess_for(engine.config) if preprocess is None else preprocess
    stream = iter(sources)
    while part := [preprocess(_opened(source)) for source in itertools.islice(stream, BATCH)]:
        yield torch.from_numpy(np.stack(part))


def _opened(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        return open_image(source)
    except ImageFileError as error:
        raise InputError(str(error)) from None


def _mask(index: torch.Tensor, config: Config) -> np.ndarray:
    """Convert positions (B, k) to a (B, rows, columns) bool mask."""
    mask = torch.zeros(len(index), config.num_patches, dtype=torch.bool).scatter_(1, index.cpu(), True)
    return mask.view(-1, *config.grid).numpy()


def dim_dropped(source: Image.Image, kept: np.ndarray) -> Image.Image:
    """Return the image with dropped patches blended to light grey; `kept` is (rows, columns) bool."""
    pixels = np.asarray(source)
    rows, columns = kept.shape
    patches = kept.repeat(source.height // rows, axis=0).repeat(source.width // columns, axis=1)
    dimmed = pixels * (1 - DIM) + np.array(NEUTRAL) * DIM
    return Image.fromarray(np.where(patches[..., None], pixels, dimmed.round()).astype(np.uint8))


def draw_seen(seen: Sequence[Seen], config: Config) -> Image.Image:
    """Draw the sheet of `draw_kept`."""
    sheet = _Sheet(config, panels=1 + len(config.num_keep), rows=len(seen))
    captions = ["original", *_stages(config)]
    for row, one in enumerate(seen):
        panels = [one.source, *(dim_dropped(one.source, kept) for kept in one.kept)]
        for column, (caption, panel) in enumerate(zip(captions, panels, strict=True)):
            sheet.place(row, column, panel, caption)
        sheet.write_under(row, one.label, one.share)
    return sheet.image


def draw_shares(shares: np.ndarray, count: int, config: Config) -> Image.Image:
    """Draw the sheet of `draw_heat_map`, from the shares that `keep_shares` returns."""
    sheet = _Sheet(config, panels=len(shares), rows=1, legend=True)
    height, width = config.image_size
    for column, (caption, share) in enumerate(zip(_stages(config), shares, strict=True)):
        panel = Image.fromarray(viridis(share)).resize((width, height), Image.Resampling.NEAREST)
        sheet.place(0, column, panel, caption)
    sheet.write_under(0, f"{count:,} image{'s' * (count != 1)}; share that kept the patch")
    sheet.draw_legend()
    return sheet.image


def viridis(shares: np.ndarray) -> np.ndarray:
    """Map shares from 0 to 1 to colours, (..., 3) uint8."""
    stops = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(shares, stops, channel) for channel in zip(*VIRIDIS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _stages(config: Config) -> list[str]:
    return [f"stage {s + 1}: {count} of {config.num_patches}" for s, count in enumerate(config.num_keep)]


class _Sheet:
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
