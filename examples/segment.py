"""Train a segmentation head on the feature maps of a pruned model: python examples/segment.py [IMAGES] [EPOCHS]

The model keeps 14 of 64 patches and stays as it is. The head, one 1x1 convolution, learns which pixels belong to the
whole digit among pieces of others (bench/proof). Printed is the intersection over union on images that it has not seen.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import dvit_infer as dvit

PROOF = Path(__file__).parents[1] / "bench" / "proof"
sys.path.append(str(PROOF))
from cluttered_digits import draw_with_masks  # noqa: E402


def drawn(count: int, split: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (B, 3, 64, 64) uint8 and masks (B, 1, 64, 64) float32."""
    images, _, masks = draw_with_masks(count, split, seed)
    return torch.from_numpy(images), torch.from_numpy(masks)[:, None].float()


def trained_head(maps: torch.Tensor, masks: torch.Tensor, epochs: int) -> nn.Module:
    """Return a head that gives a logit for every pixel: one 1x1 convolution to the 8 x 8 pixels of a patch."""
    torch.manual_seed(0)
    scale = masks.shape[2] // maps.shape[2]
    head = nn.Sequential(nn.BatchNorm2d(maps.shape[1]), nn.Conv2d(maps.shape[1], scale**2, 1), nn.PixelShuffle(scale))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    batches = epochs * (len(maps) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    for _ in range(batches):
        some = torch.randint(len(maps), (64,))
        loss = F.binary_cross_entropy_with_logits(head(maps[some]), masks[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


@torch.no_grad()
def iou(head: nn.Module, maps: torch.Tensor, masks: torch.Tensor) -> float:
    """Return the mean over images of intersection over union."""
    found, real = head(maps) > 0, masks > 0
    both, either = (found & real).sum(dim=(1, 2, 3)), (found | real).sum(dim=(1, 2, 3))
    return (both / either).mean().item()


def main(count: int = 2000, epochs: int = 20) -> None:
    train, test = drawn(count, "train", 1), drawn(count // 4, "test", 2)
    engine = dvit.convert(PROOF / "digits-0.7.pth")
    dense = dvit.convert(PROOF / "dense.pth")
    for name, model, fill in (
        ("dense", dense, "last"),
        ("pruned, fill='last'", engine, "last"),
        ("pruned, fill='zeros'", engine, "zeros"),
    ):
        of_train, of_test = (model.feature_map(images, fill=fill).cpu() for images, _ in (train, test))
        head = trained_head(of_train, train[1], epochs)
        print(f"{name:22} IoU {iou(head, of_test, test[1]):.3f}   {model.graph.gmacs * 1e3:.1f} million MACs an image")


if __name__ == "__main__":
    if len(sys.argv) > 3 or not all(number.isdigit() for number in sys.argv[1:]):
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:]))
