"""Windows by index arithmetic are those that rolling and padding make, cut where these are."""

import pytest
import torch
from torch.nn import functional as F

from dvit_infer.graph.windows import Windows
from dvit_infer.models.swin.reference import cut_mask


def rolled(x: torch.Tensor, side: int, shift: int, pads: str) -> torch.Tensor:
    """(H, W) -> (windows, M), by rolling and padding with -1."""
    padding = (0, -x.shape[1] % side, 0, -x.shape[0] % side)
    x = F.pad(x, padding, value=-1) if pads == "before_roll" else x
    x = (
        F.pad(torch.roll(x, (-shift, -shift), (0, 1)), padding, value=-1)
        if pads != "before_roll"
        else torch.roll(x, (-shift, -shift), (0, 1))
    )
    rows, columns = x.shape[0] // side, x.shape[1] // side
    return x.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, -1)


@pytest.mark.parametrize("pads", ["after_roll", "before_roll"])
@pytest.mark.parametrize(("size", "side", "shift"), [((6, 9), 3, 1), ((7, 5), 3, 1), ((4, 4), 4, 2), ((5, 8), 4, 0)])
def test_index_inverse_and_masks(size, side, shift, pads):
    windows = Windows(size, side, shift, pads)
    place = torch.arange(size[0] * size[1]).view(size)
    expected = rolled(place, side, shift, pads)
    assert (expected == -1).any() == windows.is_padded
    index = windows.index.masked_fill(windows.index == place.numel(), -1)
    order = [(expected == row).all(dim=1).nonzero()[0].item() for row in index]
    assert sorted(order) == list(range(windows.count))
    assert torch.equal(windows.index.flatten()[windows.inverse], place.flatten())
    zero = torch.zeros(1, side * side, side * side)
    counts = torch.tensor([count for _, count in windows.kinds])
    ours = windows.biases(zero)[:, 0].repeat_interleave(counts, dim=0)
    rows, columns = windows.grid
    theirs = cut_mask(rows * side, columns * side, side, shift)[order] if shift else torch.zeros_like(ours)
    assert torch.equal(ours, theirs)
