"""The launches that the models make, on tensors without memory: what `make aot` compiles."""

from collections.abc import Iterator

import torch
from dvit_kernels.launch import Launch
from dvit_kernels.prune_tokens import prune_tokens_launches

# (C, (N, K) of each stage): DeiT-T, DeiT-S and LV-ViT-S, LV-ViT-M, DeiT-B at 224 pixels; LV-ViT-S at 384.
STAGES_224 = ((196, 137), (137, 96), (96, 67))
MODELS = ((192, STAGES_224), (384, STAGES_224), (512, STAGES_224), (768, STAGES_224), (384, ((576, 403), (403, 282))))


def prune_tokens(batch: int, n: int, c: int, num_keep: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of one stage, on tensors without memory."""
    half, quarter = c // 2, c // 4
    matrices = {0: (c, c), 3: (half, half), 4: (half, half), 6: (quarter, half)}
    vectors = {1: (c,), 2: (c,), 5: (half,), 7: (quarter,), 8: (quarter,), 9: (1,)}
    packed = [
        torch.empty(matrices[i], dtype=dtype, device="meta")
        if i in matrices
        else torch.empty(vectors[i], device="meta")
        for i in range(10)
    ]
    x = torch.empty(batch, n + 1, c, dtype=dtype, device="meta")
    return prune_tokens_launches(x, packed, num_keep, 1, 1e-5)[0]


def launches() -> Iterator[Launch]:
    """The launches that the models make at batch 1 and 256; in float16 and float32, of their first stage."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for c, stages in MODELS:
            for batch in (1, 256):
                for n, num_keep in stages if dtype == torch.bfloat16 else stages[:1]:
                    yield from prune_tokens(batch, n, c, num_keep, dtype)
