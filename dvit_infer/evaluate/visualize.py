"""Draw the patches that a model keeps or merges: stage by stage for a few images, as a heat map for many."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dvit_infer.classifier import Classifier
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.evaluate.one_logit import as_classes
from dvit_infer.evaluate.panels import dim_dropped, draw_regions
from dvit_infer.evaluate.sheet import Sheet, viridis
from dvit_infer.images.decode import ImageFileError, open_image
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.models.preprocessing import preprocess_for

ImageSource = Image.Image | str | Path

BATCH = 16  # images at a time
PANELS = 4  # of an image, at most: of more stages some are drawn


@dataclass(frozen=True)
class Seen:
    """An image with the engine's prediction and kept patches.

    Attributes:
        source: the image as the model sees it, (H, W) pixels of its `image_size`.
        label, probability: the most likely class; None: the model has no classifier, as the label says.
        kept: for each stage, (rows, columns) bool over the patch grid; () if the model merges tokens.
        groups: for each stage that merges, (rows, columns) int, equal for patches that one token holds.
    """

    source: Image.Image
    label: str
    probability: float | None
    kept: tuple[np.ndarray, ...]
    groups: tuple[np.ndarray, ...] = ()

    def panel(self, stage: int) -> Image.Image:
        """Draw what is left after a stage."""
        return (
            draw_regions(self.source, self.groups[stage]) if self.groups else dim_dropped(self.source, self.kept[stage])
        )

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
    """Draw a row for each image: the model's input with its prediction, then each stage, or `PANELS` of more stages.

    Dropped patches are dimmed. Merged ones have the mean colour of all patches that their token holds, with outlines.
    Tokens into which EViT fuses others have no place.

    Args:
        engine: a model that drops or merges tokens.
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
    """Draw the share of images that kept each patch, with panels as `draw_kept` and a legend; see `keep_shares`.

    The images may be a stream: memory does not grow with their number. Arguments and errors as `draw_kept`.
    """
    shares, count = keep_shares(engine, _batches(engine, sources, preprocess))
    return draw_shares(shares, count, engine.config)


def look(engine: Classifier, batches: Iterable[torch.Tensor], labels: Mapping[int, str] | None = None) -> list[Seen]:
    """Run the engine on each image.

    Args:
        engine: a model that drops or merges tokens.
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
        merges = config.reduction.merges
        stages = [(_on_grid if merges else _mask)(stage, config) for stage in kept]
        for place, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
            if math.isnan(probabilities[place]):
                raise InputError(f"dtype: in {engine.precision} the model's output has NaN or Inf")
            named = (labels or {}).get(classes[place], f"class {classes[place]}"), probabilities[place]
            label, probability = named if config.num_classes else ("no classifier", None)
            own = tuple(stage[place] for stage in stages)
            left = ((), own) if merges else (own, ())
            seen.append(Seen(Image.fromarray(pixels), label, probability, *left))
    if not seen:
        raise InputError("images: there are none")
    return seen


def keep_shares(engine: Classifier, batches: Iterable[torch.Tensor]) -> tuple[np.ndarray, int]:
    """Measure how often each patch is kept, or how much of a token it has where tokens merge: 1/2 in a pair.

    Either way, a stage's sum over the grid is the mean number of tokens that it leaves of patches.

    Args:
        engine: a model that drops or merges tokens.
        batches: images in the engine's size, (B, 3, H, W).

    Returns:
        (stages, rows, columns) float64, the mean of that share over the images, and the number of images.

    Raises:
        InputError: The model drops no tokens, or there are no images.
    """
    config = engine.config
    check_drops(config)
    sums = np.zeros((len(config.reduction.stages), *config.grid))
    shares = _shares_of_token if config.reduction.merges else _mask
    count = 0
    for images in batches:
        _, kept = engine(images, return_kept=True)
        sums += np.stack([shares(stage, config).sum(axis=0) for stage in kept])
        count += len(images)
    if not count:
        raise InputError("images: there are none")
    return sums / count, count


def check_drops(config: Config) -> None:
    """Raise InputError unless the model drops or merges tokens."""
    if not config.reduction.stages:
        because = "method: none" if config.reduction.method == "none" else "merge: no block merges any"
        raise InputError(f"{because}, so {config.arch} keeps every patch and there is nothing to draw")


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
    """Convert positions (B, k) to a (B, rows, columns) bool mask; those of fused tokens are beyond the grid."""
    beyond = config.num_patches + len(config.reduction.stages)
    mask = torch.zeros(len(index), beyond, dtype=torch.bool).scatter_(1, index.cpu(), True)
    return _on_grid(mask[:, : config.num_patches], config)


def _on_grid(values: torch.Tensor, config: Config) -> np.ndarray:
    return values.cpu().reshape(-1, *config.grid).numpy()


def _shares_of_token(groups: torch.Tensor, config: Config) -> np.ndarray:
    """Convert groups (B, N) to the share of a token that each patch has, (B, rows, columns) float64."""
    groups = groups.cpu()
    ones = torch.ones(groups.shape, dtype=torch.float64)
    sizes = torch.zeros(len(groups), config.num_patches + 1, dtype=torch.float64).scatter_add_(1, groups, ones)
    return _on_grid(1 / sizes.gather(1, groups), config)


def draw_seen(seen: Sequence[Seen], config: Config) -> Image.Image:
    """Draw the sheet of `draw_kept`."""
    stages = drawn_stages(config)
    sheet = Sheet(config, panels=1 + len(stages), rows=len(seen))
    captions = ["original", *(_caption(config, stage) for stage in stages)]
    for row, one in enumerate(seen):
        panels = [one.source, *(one.panel(stage) for stage in stages)]
        for column, (caption, panel) in enumerate(zip(captions, panels, strict=True)):
            sheet.place(row, column, panel, caption)
        sheet.write_under(row, one.label, one.share)
    return sheet.image


def draw_shares(shares: np.ndarray, count: int, config: Config) -> Image.Image:
    """Draw the sheet of `draw_heat_map`, from the shares that `keep_shares` returns."""
    stages = drawn_stages(config)
    sheet = Sheet(config, panels=len(stages), rows=1, legend=True)
    height, width = config.image_size
    for column, stage in enumerate(stages):
        panel = Image.fromarray(viridis(shares[stage])).resize((width, height), Image.Resampling.NEAREST)
        sheet.place(0, column, panel, _caption(config, stage))
    what = "share of a token that a patch has" if config.reduction.merges else "share that kept the patch"
    sheet.write_under(0, f"{count:,} image{'s' * (count != 1)}; {what}")
    sheet.draw_legend()
    return sheet.image


def drawn_stages(config: Config) -> list[int]:
    """Return the stages to draw: all, or `PANELS` of them in equal steps, the last included."""
    count = len(config.reduction.stages)
    return [round(count * (i + 1) / PANELS) - 1 for i in range(PANELS)] if count > PANELS else list(range(count))


def _caption(config: Config, stage: int) -> str:
    reduction = config.reduction
    place = f"after block {reduction.blocks[stage]}" if reduction.merges else f"stage {stage + 1}"
    return f"{place}: {reduction.stages[stage].keep} of {reduction.num_patches}"
