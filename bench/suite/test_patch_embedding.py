"""Images to tokens as one op against normalisation, convolution and concatenation in eager PyTorch, DeiT-S."""

import pytest
import torch
from torch.nn import functional as F

from dvit_infer.config import IMAGENET_MEAN, IMAGENET_STD
from dvit_infer.images.tensors import normalise
from dvit_infer.ops.patch_embedding import pack_patch_embedding, patch_embedding

PATCH, DIM, TOKENS = 16, 384, 197


@pytest.mark.parametrize("images", ["float", "uint8"])
@pytest.mark.parametrize("runtime", ["eager", "op"])
def test_patch_embedding(given, runtime, device, dtype, batch, timed):
    generator = torch.Generator().manual_seed(0)
    shapes = (DIM, 3, PATCH, PATCH), (DIM,), (1, 1, DIM), (1, TOKENS, DIM)
    weight, bias, prefix, pos_embed = (0.05 * torch.randn(s, generator=generator).to(device) for s in shapes)
    pixels = torch.randint(256, (batch, 3, 224, 224), generator=generator, dtype=torch.uint8).to(device)
    uint8 = given == "uint8"
    images = pixels if uint8 else normalise(pixels, IMAGENET_MEAN, IMAGENET_STD).to(dtype)
    statistics = (IMAGENET_MEAN, IMAGENET_STD) if uint8 else (None, None)
    packed = pack_patch_embedding(*(t.to(dtype) for t in (weight, bias, prefix, pos_embed)), dtype, *statistics)

    def eager(images: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        x = (normalise(images, *statistics) if uint8 else images).to(kind)
        w, b, first, position = (t.to(kind) for t in (weight, bias, prefix, pos_embed))
        patches = F.conv2d(x, w, b, stride=PATCH).flatten(2).transpose(1, 2)
        return torch.cat([first.expand(len(x), -1, -1), patches], dim=1) + position

    candidates = {"eager": lambda: eager(images, dtype), "op": lambda: patch_embedding(images, *packed[:2], PATCH)}
    row = {"op": f"patch embedding, {given}", "runtime": runtime, "batch": batch, "shape": [224, 224, DIM]}
    timed(candidates[runtime], eager(images, torch.float32), f"patch embedding, {given}", **row)
