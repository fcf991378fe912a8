"""The description of a model: everything but its weights. Does not import torch."""

from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["predictor", "none"]
METHODS: tuple[str, ...] = get_args(Method)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    """A vision transformer whose patch tokens may be pruned by learned scores.

    Sizes are (height, width) in pixels. The position embedding was trained for `trained_size` and is resampled when
    `image_size` is another. `method` is 'predictor' (pruned before the blocks `prune_at`) or 'none' (dense, whether
    or not the weights hold predictors).
    """

    arch: str  # a name from list_archs(), or family-WIDTHxDEPTH for an unnamed size
    family: str
    image_size: tuple[int, int]
    trained_size: tuple[int, int]
    patch_size: int
    num_classes: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    eps: float  # for every LayerNorm in the blocks and for the last one
    num_prefix: int  # class token, and distillation token if present: never pruned
    method: Method
    prune_at: tuple[int, ...]  # one 0-based block index for each predictor in the weights
    keep_rate: float
    predictor_eps: float = 1e-5
    stem_dim: int = 0  # channels of LV-ViT's convolutional stem
    skip_lam: float = 1.0  # LV-ViT divides its residual branches by this
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float | None = None  # share of an image's shorter side that evaluation keeps; None: the family's
    weights: str | None = None  # which of a checkpoint's sets of weights is used

    @property
    def grid(self) -> tuple[int, int]:
        """The number of patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def trained_grid(self) -> tuple[int, int]:
        return self.trained_size[0] // self.patch_size, self.trained_size[1] // self.patch_size

    @property
    def num_keep(self) -> tuple[int, ...]:
        """The number of patch tokens kept at each stage; () when dense.

        The counts are `int(N * rate)` of the original N, with rates r, r**2, r**3 in double precision, as in
        DynamicViT's own inference script (Rao et al. 2021, section 3.3, and `infer.py`): a rounded rate can change a
        count.
        """
        if self.method == "none":
            return ()
        return tuple(int(self.num_patches * self.keep_rate ** (s + 1)) for s in range(len(self.prune_at)))
