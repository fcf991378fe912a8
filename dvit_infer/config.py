"""The description of a model: everything but its weights. Does not import torch."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

Size = tuple[int, int]  # (height, width)
Floats = tuple[float, ...]
Setting = bool | float | str | tuple[float, ...]
Ranges = tuple[tuple[str, float, float], ...]  # (linear, lowest, highest) of its inputs

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # each at the place of Pillow's number
CROP_MODES = ("center", "center_floor", "squash")


@dataclass(frozen=True)
class Stage:
    """One reduction of tokens.

    Attributes:
        block: 0-based index of the block it belongs to.
        keep: the number of patch tokens that remain; None: it differs by image.
        where: its place in the block. 'mlp': all tokens stay, and those kept take the MLPs from this block on.
    """

    block: int
    keep: int | None = None
    where: Literal["before", "after_attention", "mlp"] = "before"


@dataclass(frozen=True)
class Reduction:
    """Which tokens stay; without stages the model is dense.

    `str()` labels it, as in 'predictor 0.7: 137,96,67 of 196', in rows, titles, charts and keys.

    Attributes:
        method: a name in `reduction.METHODS`, or 'none'.
        stages: the stages in order, with their counts spelled out.
        settings: what the method was given, by name; the first is part of the label.
        num_patches: the number of patch tokens before the first stage.
        merges: whether tokens are merged, not dropped.
    """

    method: str = "none"
    stages: tuple[Stage, ...] = ()
    settings: tuple[tuple[str, Setting], ...] = ()
    num_patches: int = 0
    merges: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(stage.block for stage in self.stages)

    @property
    def keep_rate(self) -> float:
        """The share of patch tokens that the first stage keeps, or the last one leaves if they merge: 1 if dense."""
        if not self.stages:
            return 1.0
        stated = dict(self.settings).get("keep_rate")
        first = stated[0] if isinstance(stated, tuple) else stated
        if isinstance(first, float) and first <= 1:
            return first
        return (self.stages[-1 if self.merges else 0].keep or 0) / max(1, self.num_patches)

    @property
    def choice_sizes(self) -> tuple[int, ...]:
        """The number of positions by which each stage's choice is stated: those kept, or all, each with its group."""
        return tuple(self.num_patches if self.merges else stage.keep or 0 for stage in self.stages)

    @property
    def routes(self) -> bool:
        """Whether all tokens stay, and those that a stage does not keep pass its MLPs by; each stage ranks all."""
        return any(stage.where == "mlp" for stage in self.stages)

    def fuses(self, stage: int) -> bool:
        """Return whether a stage fuses the tokens that it drops into one more."""
        before = self.num_patches if not stage else (self.stages[stage - 1].keep or 0) + self.fuses(stage - 1)
        return bool(dict(self.settings).get("fuse")) and (self.stages[stage].keep or 0) < before

    def __str__(self) -> str:
        if not self.stages:
            return "dense"
        shown = [_listed(value) for _, value in self.settings[:1]]
        shown += [f"{name}={str(value).lower()}" for name, value in self.settings[1:] if value in (False, "pooled")]
        named = " ".join([self.method, *shown])
        counts = ",".join("?" if stage.keep is None else str(stage.keep) for stage in self.stages)
        return f"{named}: {counts} of {self.num_patches}"


def _listed(value: Setting) -> str:
    """Return a setting for a label; '13x11,0' is eleven times 13, then 0."""
    if isinstance(value, str):
        return value
    parts = []
    for number, run in itertools.groupby(value if isinstance(value, tuple) else (value,)):
        count, text = len(list(run)), str(number) if isinstance(number, int) else f"{number:g}"
        parts.append(f"{text}x{count}" if count > 2 else ",".join([text] * count))
    return parts[0].partition("x")[0].partition(",")[0] if len(parts) == 1 else ",".join(parts)


@dataclass(frozen=True)
class Body:
    """What only one family knows about a model. Every family has a subclass.

    Attributes:
        patch_size: pixels per side of the patches among which a reduction chooses.
        embed_dim: channels of their tokens.
        depth: the number of blocks before or in which it may choose.
        routes: whether a reduction may only choose which tokens take the MLPs, as all have to stay.
    """

    routes: ClassVar[bool] = False
    patch_size: int
    embed_dim: int
    depth: int

    @property
    def pooled_dim(self) -> int:
        """Channels of the row that pooling returns and a classifier reads."""
        return self.embed_dim

    def grid(self, size: Size) -> Size:
        """Return the number of patches down and across an image of that size."""
        return size[0] // self.patch_size, size[1] // self.patch_size

    def last_grid(self, size: Size) -> Size:
        """Return the same of the tokens behind the last block of a dense model."""
        return self.grid(size)

    def why_not_size(self, size: Size) -> str | None:
        """Return why images cannot have that size; None: they can."""
        if size[0] % self.patch_size or size[1] % self.patch_size:
            return f"is not a multiple of the patch size {self.patch_size}"
        return None


@dataclass(frozen=True)
class Config:
    """A vision transformer, and which of its tokens stay.

    Sizes are (height, width) in pixels. The position embedding was trained for `trained_size` and is resampled when
    `image_size` is another.

    Attributes:
        arch: a name from `list_archs()`, or family-WIDTHxDEPTH for an unnamed size.
        family: the name of the family that reads and builds it.
        num_classes: K; 0 without a classifier.
        image_size: (height, width) it runs at.
        trained_size: (height, width) of the position embedding in the file.
        body: the facts of the family: patch size, width, depth, heads and so on.
        reduction: which tokens stay, as it runs.
        learned: the reduction whose modules are among the weights, whether or not it runs.
        mean: of the three channels, by which images are normalised.
        std: likewise.
        crop_pct: share of a resized image's shorter side that evaluation keeps; None: the family's, or all of a squash.
        crop_mode: how images are resized and cropped; see `images.preprocess.Preprocess`.
        interpolation: the filter that resizes them, by Pillow's name.
        weights: which of a checkpoint's sets of weights is used.
        ranges: of the inputs of linears, by calibration images, for int8; (): they were not measured.
        assumed: those of mean, std and crop_pct that nothing states: not the file, nor its trainer, nor the caller.
            `crop_pct` stands for `crop_mode` and `interpolation` too.
    """

    arch: str
    family: str
    num_classes: int
    image_size: Size
    trained_size: Size
    body: Body
    reduction: Reduction = Reduction()
    learned: Reduction = Reduction()
    mean: Floats = IMAGENET_MEAN
    std: Floats = IMAGENET_STD
    crop_pct: float | None = None
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    weights: str | None = None
    assumed: tuple[str, ...] = ()
    ranges: Ranges = ()

    @property
    def grid(self) -> Size:
        """The number of patches down and across."""
        return self.body.grid(self.image_size)

    @property
    def num_patches(self) -> int:
        """N, the number of patch tokens before any reduction."""
        return self.grid[0] * self.grid[1]

    @property
    def trained_grid(self) -> Size:
        """The same at the trained size."""
        return self.body.grid(self.trained_size)

    @property
    def num_keep(self) -> tuple[int, ...]:
        """The number of patch tokens kept at each stage; () when dense."""
        return tuple(stage.keep or 0 for stage in self.reduction.stages)

    def facts(self) -> dict[str, Any]:
        """Return the facts of its parts by the names that Config had for them before it had parts (0.1.0)."""
        owned = self.reduction if self.reduction.stages else self.learned
        settings = {**dict(self.learned.settings), **dict(owned.settings)}
        named = {"keep_rate": owned.keep_rate, **settings, "prune_at": owned.blocks}
        return {**vars(self.body), **named, "method": self.reduction.method}

    if not TYPE_CHECKING:  # our code names the part that it reads

        def __getattr__(self, name: str) -> Any:
            """Return one of the facts."""
            if name.startswith("_") or "body" not in self.__dict__:  # being copied or unpickled
                raise AttributeError(name)
            facts = self.facts()
            if name not in facts:
                raise AttributeError(f"a Config has no {name!r}")
            return facts[name]
