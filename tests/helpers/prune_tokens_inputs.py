"""What tests of prune_tokens share: a predictor and tokens."""

import torch

from dvit_infer.reduction.predictor import Predictor


def make_predictor(dim: int, seed: int = 0) -> Predictor:
    torch.manual_seed(seed)
    predictor = Predictor(dim, 1e-5)
    with torch.no_grad():
        for name, p in predictor.named_parameters():
            scale = 3.0 if name.startswith("out_conv.4.weight") else 1.2
            p.copy_(torch.randn_like(p) * scale / p.shape[-1] ** 0.5 if p.ndim == 2 else torch.randn_like(p) * 0.1)
        predictor.in_conv[0].weight.add_(1.0)
    return predictor


def make_x(b: int, n: int, p: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(b * 1000 + n)
    return torch.randn(b, p + n, dim, generator=generator).to(dtype)
