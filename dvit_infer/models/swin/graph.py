"""Build the graph of a Swin Transformer, with unchanged weights; nothing is folded yet."""

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch

from dvit_infer.config import Config
from dvit_infer.graph.heads import Head, Pool
from dvit_infer.graph.maps import Downsample, Stem, WindowAttention
from dvit_infer.graph.nodes import Node
from dvit_infer.graph.windows import Windows
from dvit_infer.models.hierarchical.graph import THIRD, Routes, Tensors, own, unprefixed
from dvit_infer.models.swin.reference import Block, PatchMerging, SwinTransformer


def graph(model: SwinTransformer, config: Config) -> Iterator[Node]:
    """Yield the nodes of a reference model in evaluation, for one image size."""
    body = model.body
    maps, eps = body.maps(config.image_size), body.eps
    weights = unprefixed(own(model.patch_embed, w="proj", norm="norm"), "w.")
    yield Stem(name="stem", equals="layers.0.blocks.0:in", weights=weights, image=config.image_size, eps=eps)
    routes = Routes(config, model.stages()[2].score_predictor, "layers.2.blocks.")
    for number, stage in enumerate(model.stages()):
        height, width = maps[number]
        facts: dict[str, Any] = {"tokens": height * width, "eps": eps}
        for i, block in enumerate(stage.blocks):
            assert isinstance(block, Block)
            name = f"layers.{number}.blocks.{i}"
            yield from routes.before(number, i)
            pads = cast(Literal["", "after_roll", "before_roll"], body.pads)
            windows = Windows(maps[number], block.window, block.shift, pads)
            yield WindowAttention(
                name=f"{name}.attn",
                equals=f"{name}.norm2:in" if number != THIRD or not config.reduction.stages else "",
                weights=_attention(block, windows),
                windows=windows,
                num_heads=block.attn.num_heads,
                scale=block.attn.scale,
                **facts,
            )
            mlp = own(block, norm="norm2", fc1="mlp.fc1", fc2="mlp.fc2")
            fast = own(block, fast_norm="fastmlp.fc1.0", fast="fastmlp.fc1.1")
            yield routes.mlp(number, mlp, fast, name=f"{name}.mlp", equals=f"{name}:out", **facts)
        if stage.downsample is not None:
            name, weights = f"layers.{number}.downsample", _merging(stage.downsample)
            following = f"layers.{number + 1}.blocks.0:in"
            how: dict[str, Any] = {"map": maps[number], "norms_four": True, "pads": True}
            yield Downsample(name=name, equals=following, weights=weights, **how, **facts)
    tokens = maps[-1][0] * maps[-1][1]
    last: dict[str, Any] = {"tokens": tokens, "eps": eps, "reads": "mean", "num_prefix": 0, "equals": ":out"}
    if config.num_classes:
        yield Head(name="head", weights=own(model, norm="norm", head="head"), **last)
    else:
        yield Pool(name="pool", weights=own(model, last_norm="norm"), channels=body.dims[-1], **last)


def _attention(block: Block, windows: Windows) -> Tensors:
    weights = own(block, norm="norm1", qkv="attn.qkv", proj="attn.proj")
    weights["bias"] = windows.biases(block.attn.bias().detach())
    if windows.is_padded:
        weights["pad"] = weights["qkv.bias"]
    return weights


def _merging(merging: PatchMerging) -> Tensors:
    """Return the weights with the four positions row by row; the official order is column by column."""

    def row_by_row(w: torch.Tensor) -> torch.Tensor:
        return w.view(*w.shape[:-1], 2, 2, -1).transpose(-3, -2).flatten(-3)

    return {name: row_by_row(w) for name, w in own(merging, norm="norm", reduction="reduction").items()}
