"""The facts of a Swin Transformer. Does not import torch."""

import itertools
import math
from dataclasses import dataclass

from dvit_infer.config import Size
from dvit_infer.errors import InputError
from dvit_infer.models.hierarchical.body import Hierarchical

PADS = ("", "after_roll", "before_roll")


@dataclass(frozen=True)
class Swin(Hierarchical):
    """A Swin Transformer (Liu et al. 2021), DynamicSwin (Rao et al. 2023) if it has predictors.

    Attributes:
        heads: the number of heads of each stage.
        windows: positions per side of each stage's windows.
        pads: how maps that are no multiple of the window are padded with zeros: "after_roll", as timm does, or
            "before_roll", as EsViT does; windows and shifts are then those of the size they were built at. "": not at
            all, as in the official code, which builds windows for the size that runs.
    """

    heads: tuple[int, ...]
    windows: tuple[int, ...]
    pads: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pads not in PADS:
            raise InputError(f"pads: {self.pads[:40]!r} is not one of {', '.join(filter(None, PADS))}")
        if len(self.heads) != len(self.windows) or len(self.heads) != len(self.dims):
            raise InputError(f"heads: {self.heads} and windows {self.windows} are not one for each stage")
        if any(dim % heads for dim, heads in zip(self.dims, self.heads, strict=True)):
            raise InputError(f"heads: {self.heads} do not divide {self.dims} channels")
        if any(later != 2 * dim for dim, later in itertools.pairwise(self.dims)):
            raise InputError(f"dims: {self.dims} do not double from stage to stage")

    def maps(self, size: Size) -> list[Size]:
        """Return (height, width) of each stage's map; odd ones are padded before they are halved."""
        height, width = size[0] // self.stem_size, size[1] // self.stem_size
        return [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(self.depths))]

    def why_not_size(self, size: Size) -> str | None:
        if size[0] % self.stem_size or size[1] % self.stem_size:
            return f"is not a multiple of the patch size {self.stem_size}"
        if self.pads:
            return None
        wholes = [window * self.stem_size << stage for stage, window in enumerate(self.windows)]
        cut = next((stage for stage, whole in enumerate(wholes) if size[0] % whole or size[1] % whole), None)
        if cut is not None:
            window, least = self.windows[cut], math.lcm(*wholes)
            return f"cuts windows of {window}x{window} in stage {cut}; multiples of {least} do not"
        if not self.fits(size):
            return f"has other windows than {', '.join(map(str, self.windows))}, which the weights are for"
        return None

    def shifts(self, built: Size) -> list[int]:
        """Return by how much every second block of each stage shifts its windows, if built for images of that size.

        A stage with one window across does not shift it.
        """
        sides = [min(side) for side in self.maps(built)]
        return [0 if side <= window else window // 2 for side, window in zip(sides, self.windows, strict=True)]

    def fits(self, built: Size) -> bool:
        """Return whether windows built for that size, of one size for all stages, are these."""
        widest = max(self.windows)
        sides = [min(side) for side in self.maps(built)]
        return all(window == min(widest, side) for side, window in zip(sides, self.windows, strict=True))
