"""Build the graph of a reference model, with unchanged weights; nothing is folded yet."""

from collections.abc import Iterator

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.graph.nodes import Attention, Convolution, Embed, Head, Mlp, Node
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.lvvit import ConvStem
from dvit_infer.models.vit.reference import VisionTransformer
from dvit_infer.reduction import METHODS


def graph(model: VisionTransformer, config: Config) -> Iterator[Node]:
    """Yield the nodes of a reference model in evaluation, for one image size."""
    yield from _embed(model, config)
    yield from _trunk(model, config)


def _own(module: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of the modules `names` inside `module`, without counters."""
    found = {key: value.detach() for key, value in module.state_dict().items() if value.is_floating_point()}
    return {key: value for key, value in found.items() if key.startswith(names)}


def _renamed(weights: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in weights.items()}


def _embed(model: VisionTransformer, config: Config) -> Iterator[Node]:
    image = config.image_size
    # The input of a block can be recorded by a hook; that of a predictor before it lacks the prefix tokens.
    equals = "" if 0 in config.reduction.blocks else "blocks.0:in"
    stem = model.patch_embed
    if isinstance(stem, ConvStem):
        for conv, norm, follower in (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3"), ("conv3", "bn3", "proj")):
            weights = {**_renamed(_own(stem, f"{conv}."), f"{conv}.", ""), **_renamed(_own(stem, norm), norm, "bn")}
            stride = getattr(stem, conv).stride[0]
            yield Convolution(
                name=f"stem.{conv}",
                equals=f"patch_embed.{follower}:in",
                weights=weights,
                image=image,
                stride=stride,
                eps=getattr(stem, norm).eps,
            )
            image = image[0] // stride, image[1] // stride
    weights = _renamed(_own(stem, "proj."), "proj.", "")
    prefix, pos_embed = torch.cat(model.prefix_tokens(), dim=1).detach(), model.pos_embed.detach()
    if model.no_embed_class:
        pos_embed = torch.cat([torch.zeros_like(prefix), pos_embed], dim=1)
    weights |= {"prefix": prefix, "pos_embed": pos_embed}
    yield Embed(name="embed", equals=equals, weights=weights, image=image)


def _trunk(model: VisionTransformer, config: Config) -> Iterator[Node]:
    body = config.body
    assert isinstance(body, ViT)
    prefix, residual = body.num_prefix, 1.0 / body.skip_lam
    tokens = prefix + config.num_patches
    modules = list(model.score_predictor or ())
    for i, block in enumerate(model.blocks):
        if i in config.reduction.blocks:
            stage = config.reduction.blocks.index(i)
            keep = config.num_keep[stage]
            yield METHODS[config.reduction.method].node(
                stage,
                modules,
                name=f"prune.{stage}",
                equals=f"blocks.{i}:in",
                tokens=tokens,
                num_keep=keep,
                num_prefix=prefix,
                channels=body.embed_dim,
            )
            tokens = prefix + keep
        attention = _renamed(_renamed(_own(block, "norm1", "attn", "ls1"), "norm1", "norm"), "attn.", "")
        yield Attention(
            name=f"blocks.{i}.attn",
            equals=f"blocks.{i}.norm2:in",
            weights=_renamed(attention, "ls1.", ""),
            tokens=tokens,
            rows=tokens,
            num_heads=body.num_heads,
            eps=body.eps,
            scale=(body.embed_dim // body.num_heads) ** -0.5,
            residual_scale=residual,
        )
        mlp = _renamed(_renamed(_own(block, "norm2", "mlp", "ls2"), "norm2", "norm"), "mlp.", "")
        yield Mlp(
            name=f"blocks.{i}.mlp",
            equals=f"blocks.{i}:out",
            weights=_renamed(mlp, "ls2.", ""),
            tokens=tokens,
            eps=body.eps,
            residual_scale=residual,
        )
    weights = _own(model, "norm.", "head", "aux_head")
    yield Head(
        name="head",
        equals=":out",
        weights=weights,
        tokens=tokens,
        eps=body.eps,
        reads="all" if "aux_head.weight" in weights else "prefix",
        num_prefix=prefix,
    )
