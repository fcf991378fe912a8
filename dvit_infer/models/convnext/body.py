"""The facts of a ConvNeXt. Does not import torch."""

from dataclasses import dataclass

from dvit_infer.config import Size
from dvit_infer.models.hierarchical.body import Hierarchical


@dataclass(frozen=True)
class ConvNeXt(Hierarchical):
    """A ConvNeXt (Liu et al. 2022), DynamicConvNeXt (Rao et al. 2023) if it has predictors.

    Attributes:
        kernel: pixels per side of the depthwise convolutions.
    """

    kernel: int = 7

    def why_not_size(self, size: Size) -> str | None:
        least = 8 * self.stem_size
        return f"is under {least} pixels, which the last stage needs" if min(size) < least else None
