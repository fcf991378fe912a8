"""Relative position bias, as in BEiT (Bao et al. 2022): a learned term for each distance of two patches."""

import torch


def table_rows(grid: tuple[int, int]) -> int:
    """Return the rows of a table: the distances of two patches, and three for pairs with the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_position_index(grid: tuple[int, int]) -> torch.Tensor:
    """Return the row of the table for each query and key, (1+N, 1+N) int64, the class token first.

    The last three rows are those of class token to patch, patch to class token, and class token to itself.
    """
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    down, across = (axis[:, None] - axis[None] for axis in (rows, columns))
    last = table_rows(grid) - 1
    index = torch.full((len(rows) + 1, len(rows) + 1), last)
    index[1:, 1:] = (down + grid[0] - 1) * (2 * grid[1] - 1) + across + grid[1] - 1
    index[0, 1:], index[1:, 0] = last - 2, last - 1
    return index


def relative_position_bias(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(rows, heads) -> (heads, 1+N, 1+N), to be added to the scores."""
    return table[relative_position_index(grid).to(table.device)].permute(2, 0, 1)


def resample_table(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Resample a table to another grid as Hugging Face does: bilinear, the last three rows as they are."""
    if old == new:
        return table
    planes = table[:-3].float().reshape(1, 2 * old[0] - 1, 2 * old[1] - 1, -1).permute(0, 3, 1, 2)
    planes = torch.nn.functional.interpolate(planes, size=(2 * new[0] - 1, 2 * new[1] - 1), mode="bilinear")
    return torch.cat([planes[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype), table[-3:]])
