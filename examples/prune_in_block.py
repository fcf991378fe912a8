"""Prune tokens inside a model of your own by the op prune_tokens: python examples/prune_in_block.py [CHECKPOINT]

A wrapped block, and those after it, get fewer tokens. The model is timm's VisionTransformer, if timm is installed, else
this project's plain PyTorch one, whose blocks have the same names. With the predictors of a DynamicViT checkpoint the
result has to be what the engine computes; the difference is printed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dvit_infer as dvit

DIGITS = Path(__file__).parents[1] / "bench" / "proof" / "digits-0.7.pth"


class PruneBefore(nn.Module):
    """A block that begins with fewer tokens: (B, P+N, C) -> (B, P+num_keep, C), the prefix and the best patches."""

    def __init__(self, block: nn.Module, predictor: nn.Module, num_keep: int, num_prefix: int = 1) -> None:
        super().__init__()
        self.block, self.num_keep, self.num_prefix = block, num_keep, num_prefix
        self.packed = dvit.pack_predictor(predictor)  # once: for the dtype of the tokens, here float32

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        x, self.kept = dvit.prune_tokens(x, self.packed, self.num_keep, self.num_prefix)
        out: torch.Tensor = self.block(x, *others)
        return out


def dense_model(checkpoint: str | Path, config: dvit.Config) -> nn.Module:
    """Return the model of a DynamicViT checkpoint without its pruning."""
    plain = dvit.load_reference(checkpoint, method="none")
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        return plain.eval()
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.body.patch_size,
        num_classes=config.num_classes,
        embed_dim=config.body.embed_dim,
        depth=config.body.depth,
        num_heads=config.body.num_heads,
    )
    weights = plain.state_dict()  # under timm's names, but for the predictors, which it does not have
    model.load_state_dict({name: weight for name, weight in weights.items() if "score_predictor" not in name})
    return model.eval()


@torch.inference_mode()
def main(checkpoint: str | Path = DIGITS) -> None:
    engine = dvit.convert(checkpoint, device="cpu", dtype="float32")
    predictors = dvit.load_reference(checkpoint).score_predictor
    model = dense_model(checkpoint, engine.config)
    for predictor, stage in zip(predictors, engine.config.reduction.stages, strict=True):
        model.blocks[stage.block] = PruneBefore(model.blocks[stage.block], predictor, stage.keep)
    images = torch.randn(4, 3, *engine.config.image_size)
    error = (model(images) - engine(images)).abs().max().item()
    reduction = engine.config.reduction
    print(f"{type(model).__module__}, {reduction}: largest difference from the engine's logits {error:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
