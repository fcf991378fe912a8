"""Small trainings: dense checkpoints of a few blocks, images of three classes, quick options."""

import argparse
from pathlib import Path

import torch
from drawn import draw_all

from dvit_infer.models.fill import fill
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.plain import PlainViT
from dvit_infer.models.vit.reference import VisionTransformer

KEEP = ["--keep-rate", "0.7"]
QUICK = ["--epochs", "2", "--batch", "4", "--workers", "0", "--lr", "1e-3", "--freeze-epochs", "1", "--device", "cpu"]
PLAIN = ["--mixup", "0", "--cutmix", "0"]
TRUNK = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_dim": 64, "eps": 1e-6}


def write_dense(path: Path, make: type[VisionTransformer] = PlainViT, num_classes: int = 3, **shape) -> Path:
    """A model of four blocks for images of 32 x 32; the file says how many heads it has, and how it was evaluated."""
    with torch.device("meta"):
        model = make(ViT(**{**TRUNK, **shape}), num_classes=num_classes, grid=(4, 4))
    state = {k: torch.from_numpy(fill(k, tuple(v.shape), 3)) for k, v in model.state_dict().items()}
    args = argparse.Namespace(num_heads=2, mean=[0.4] * 3, std=[0.3] * 3, skip_lam=shape.get("skip_lam", 1.0))
    torch.save({"model": state, "args": args}, path)
    return path


def write_folder(where: Path) -> Path:
    """Three classes of eight images, of several formats and sizes."""
    for label in range(3):
        draw_all(where / "abc"[label], 8, 100 * label)
    return where


def trained(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["model"]


def arguments(dense, folder, out, *more) -> list[str]:
    return [str(a) for a in (dense, folder, *KEEP, "-o", out, *QUICK, *more)]
