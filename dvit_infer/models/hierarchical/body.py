"""The facts of a model of four stages. Does not import torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from dvit_infer.config import Body, Size
from dvit_infer.errors import InputError

STAGES = 4
_MOST_BLOCKS = 1000


@dataclass(frozen=True)
class Hierarchical(Body):
    """Four stages of blocks, each on maps of half the resolution of the one before.

    `patch_size`, `embed_dim` and `depth` are those of the third stage, where a reduction chooses which positions take
    the MLPs: DynamicViT's sequel (Rao et al. 2023).

    Attributes:
        depths: the number of blocks of each stage.
        dims: the number of channels of each stage.
        mlp_ratio: the width of the MLPs over the number of channels.
        eps: for every LayerNorm but a predictor's.
        num_fast: the number of blocks, the last ones of the third stage, that have a second, cheap branch.
    """

    routes: ClassVar[bool] = True
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    mlp_ratio: int
    eps: float
    num_fast: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.depths) != STAGES or len(self.dims) != STAGES or sum(self.depths) > _MOST_BLOCKS:
            raise InputError(f"depths: {self.depths} blocks of {self.dims} channels are impossible")
        if (self.depth, self.embed_dim) != (self.depths[2], self.dims[2]):
            raise InputError(f"depth: {self.depth} blocks, but the third of {self.depths} is where a reduction chooses")
        if self.num_fast > self.depth:
            raise InputError(f"num_fast: {self.num_fast} of {self.depth} blocks are impossible")

    @property
    def stem_size(self) -> int:
        """Pixels per side of the patches that become a position of the first stage."""
        return self.patch_size // 4

    @property
    def pooled_dim(self) -> int:
        return self.dims[-1]

    def maps(self, size: Size) -> list[Size]:
        """Return (height, width) of each stage's map for images of that size."""
        height, width = size[0] // self.stem_size, size[1] // self.stem_size
        return [(height // 2**i, width // 2**i) for i in range(STAGES)]

    def grid(self, size: Size) -> Size:
        return self.maps(size)[2]

    def last_grid(self, size: Size) -> Size:
        return self.maps(size)[-1]

    @property
    def first_fast(self) -> int:
        """The first block of the third stage that has a second branch."""
        return self.depth - self.num_fast
