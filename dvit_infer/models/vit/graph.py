"""Build the graph of a reference model, with unchanged weights; nothing is folded yet."""

from collections.abc import Iterator

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Attention, Convolution, Embed, Head, Mlp, Node, Prune
from dvit_infer.models.vit.lvvit import ConvStem
from dvit_infer.models.vit.reference import VisionTransformer


def build_graph(model: nn.Module, config: Config) -> Graph:
    """Return the graph of a reference model in evaluation, for one image size.

    Raises:
        TypeError: no graph is known for this class of model.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"no graph is known for a {type(model).__name__}")
    return Graph(config, (*_embed(model, config), *_trunk(model, config)))


def _own(module: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of the modules `names` inside `module`, without counters."""
    found = {key: value.detach() for key, value in module.state_dict().items() if value.is_floating_point()}
    return {key: value for key, value in found.items() if key.startswith(names)}


def _renamed(weights: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in weights.items()}


def _embed(model: VisionTransformer, config: Config) -> Iterator[Node]:
    image = config.image_size
    # The input of a block can be recorded by a hook; that of a predictor before it lacks the prefix tokens.
    equals = "" if config.num_keep and config.prune_at[0] == 0 else "blocks.0:in"
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
    weights |= {"prefix": torch.cat(model.prefix_tokens(), dim=1).detach(), "pos_embed": model.pos_embed.detach()}
    yield Embed(name="embed", equals=equals, weights=weights, image=image)


def _trunk(model: VisionTransformer, config: Config) -> Iterator[Node]:
    tokens = config.num_prefix + config.num_patches
    for i, block in enumerate(model.blocks):
        if config.num_keep and i in config.prune_at:
            stage = config.prune_at.index(i)
            yield Prune(
                name=f"prune.{stage}",
                equals=f"blocks.{i}:in",
                weights=_own(model.score_predictor[stage], ""),
                tokens=tokens,
                num_keep=config.num_keep[stage],
                num_prefix=config.num_prefix,
                eps=config.predictor_eps,
            )
            tokens = config.num_prefix + config.num_keep[stage]
        residual = 1.0 / config.skip_lam
        attention = _renamed(_renamed(_own(block, "norm1", "attn"), "norm1", "norm"), "attn.", "")
        yield Attention(
            name=f"blocks.{i}.attn",
            equals=f"blocks.{i}.norm2:in",
            weights=attention,
            tokens=tokens,
            rows=tokens,
            num_heads=config.num_heads,
            eps=config.eps,
            scale=(config.embed_dim // config.num_heads) ** -0.5,
            residual_scale=residual,
        )
        yield Mlp(
            name=f"blocks.{i}.mlp",
            equals=f"blocks.{i}:out",
            weights=_renamed(_renamed(_own(block, "norm2", "mlp"), "norm2", "norm"), "mlp.", ""),
            tokens=tokens,
            eps=config.eps,
            residual_scale=residual,
        )
    yield Head(
        name="head", equals=":out", weights=_own(model, "norm.", "head", "aux_head"), tokens=tokens, eps=config.eps
    )
