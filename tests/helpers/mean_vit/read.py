"""Recognise the family's checkpoints and read their facts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dvit_infer.config import Body, Config
from dvit_infer.models.reading import Reading
from dvit_infer.models.reducing import check_counts, read_reductions
from dvit_infer.models.vit.pos_embed import resample_pos_embed
from dvit_infer.reduction.settings import Trunk


@dataclass(frozen=True)
class MeanViT(Body):
    """Equal blocks of `num_heads` heads."""

    num_heads: int
    mlp_dim: int


def matches(reading: Reading) -> bool:
    return "patchify.weight" in reading.shapes


def read(reading: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    dim, _, patch, _ = reading.shape("patchify.weight", 4)
    side = round(reading.shape("positions", 3)[1] ** 0.5) * patch
    heads = reading.resolve("num_heads", 2, "the family's")
    depth, mlp_dim = reading.count("layers."), reading.shape("layers.0.mlp.fc1.weight", 2)[0]
    body = MeanViT(patch, dim, depth, heads, mlp_dim)
    size = options.get("image_size") or reading.metadata.get("image_size") or side
    height, width = size if isinstance(size, tuple) else (size, size)
    rows, columns = body.grid((height, width))
    reduction, learned = read_reductions(reading, options.get("method"), Trunk(depth, dim, rows * columns))
    check_counts(reading, reduction, (height, width), options.get("image_size") is not None)
    reading.finish("mean-vit")
    return Config(
        arch="mean-vit",
        family="meanvit",
        num_classes=reading.shape("head.weight", 2)[0],
        image_size=(height, width),
        trained_size=(side, side),
        body=body,
        reduction=reduction,
        learned=learned,
    )


def resized(state: dict[str, Any], config: Config) -> dict[str, Any]:
    positions = resample_pos_embed(state["positions"], 0, config.trained_grid, config.grid)
    return {**state, "positions": positions}
