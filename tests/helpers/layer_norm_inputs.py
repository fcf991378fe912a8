"""What tests of layer_norm share: its inputs, and both ops in float64."""

import torch


def make_rows(*shape: int) -> torch.Tensor:
    """Rows of different means and spreads."""
    generator = torch.Generator().manual_seed(sum(shape))
    spread = torch.rand(*shape[:-1], 1, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) * spread + 2 * torch.randn(*shape[:-1], 1, generator=generator)


def make_vectors(
    c: int, dtype: torch.dtype, device: str = "cpu"
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Gains and shifts: neither, both in `dtype`, both in another, one alone."""
    generator = torch.Generator().manual_seed(c)
    weight, bias = (torch.randn(2, c, generator=generator) * 0.5 + 1).to(device)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    both = [(weight.to(one), bias.to(one)) for one in (dtype, other)]
    return [(None, None), *both, (weight.to(dtype), None), (None, bias.double())]


def exact_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    x = x.cpu().double()
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return y * (1 if weight is None else weight.cpu().double()) + (0 if bias is None else bias.cpu().double())


def exact_stats(x: torch.Tensor) -> torch.Tensor:
    x = x.cpu().double().reshape(-1, x.shape[-1])
    mean = x.mean(1, keepdim=True)
    return torch.stack([mean, (x - mean).square().sum(1, keepdim=True)], dim=2)
