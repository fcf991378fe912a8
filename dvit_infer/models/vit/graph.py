"""Build the graph of a reference model, with unchanged weights; nothing is folded yet."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Config, Stage
from dvit_infer.graph.heads import Classify, Head, MapPool, Pool, Reads
from dvit_infer.graph.nodes import Attention, Convolution, Embed, Mlp, Node, Norm
from dvit_infer.graph.reductions import Reduce
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.lvvit import ConvStem
from dvit_infer.models.vit.reference import VisionTransformer
from dvit_infer.reduction import METHODS

Tensors = dict[str, torch.Tensor]
PLACES_OF_STAGES = ("before", "after_attention")
_READS: dict[str, Reads] = {"token": "prefix", "mean": "mean", "mean_all": "all", "token_mean": "prefix and mean"}


def graph(model: VisionTransformer, config: Config) -> Iterator[Node]:
    """Yield the nodes of a reference model in evaluation, for one image size."""
    yield from _embed(model, config)
    tokens = model.num_prefix + config.num_patches
    for node in _trunk(model, config):
        tokens = node.out_shape[0]
        yield node
    yield from _head(model, config, tokens)


def _own(module: nn.Module, **names: str) -> Tensors:
    """Return the parameters and buffers whose names begin with a keyword's value, by the keyword in its place."""
    found: Tensors = {}
    for key, value in module.state_dict().items():
        for ours, theirs in names.items():
            if value.is_floating_point() and (key == theirs or key.startswith(f"{theirs}.")):
                found[ours + key.removeprefix(theirs)] = value.detach()
    return found


def _embed(model: VisionTransformer, config: Config) -> Iterator[Node]:
    image, body = config.image_size, model.body
    # The input of a block can be recorded by a hook; that of a predictor before it lacks the prefix tokens.
    first = "" if any(s.block == 0 and s.where == "before" for s in config.reduction.stages) else "blocks.0:in"
    stem = model.patch_embed
    if isinstance(stem, ConvStem):
        for conv, norm, follower in (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3"), ("conv3", "bn3", "proj")):
            stride = getattr(stem, conv).stride[0]
            yield Convolution(
                name=f"stem.{conv}",
                equals=f"patch_embed.{follower}:in",
                weights=_unprefixed(_own(stem, w=conv, bn=norm), "w."),
                image=image,
                stride=stride,
                eps=getattr(stem, norm).eps,
            )
            image = image[0] // stride, image[1] // stride
    rows = body.num_prefix + config.num_patches
    weights = _unprefixed(_own(stem, w="proj"), "w.")
    empty = weights["weight"].new_zeros(1, 0, body.embed_dim)
    weights["prefix"] = torch.cat([empty, *model.prefix_tokens()], dim=1).detach()
    weights["pos_embed"] = empty.new_zeros(1, rows, body.embed_dim) if body.no_pos_embed else model.positions().detach()
    equals = "norm_pre:in" if body.norm_pre else first
    yield Embed(name="embed", equals=equals, weights=weights, image=image)
    if body.norm_pre:
        weights = _own(model, norm="norm_pre")
        yield Norm(name="norm_pre", equals=first, weights=weights, tokens=rows, eps=body.eps)


def _trunk(model: VisionTransformer, config: Config) -> Iterator[Node]:
    body, reduction = model.body, config.reduction
    tokens = body.num_prefix + config.num_patches
    adds_sizes = False  # once there are merged tokens
    places = [_tensors(sin=p.sin, cos=p.cos, pair_bias=None if p.bias is None else p.bias[0]) for p in model.places()]
    for i, block in enumerate(model.blocks):
        before, after = (
            [s for s in reduction.stages if (s.block, s.where) == (i, where)] for where in PLACES_OF_STAGES
        )
        for stage in before:
            reduce = _reduce(model, config, stage, tokens, f"blocks.{i}:in")
            yield reduce
            tokens = reduce.left
        common: dict[str, Any] = {"eps": body.eps, "residual_scale": 1.0 / body.skip_lam}
        yield Attention(
            name=f"blocks.{i}.attn",
            has_inner_norm=body.attn_norm,
            equals="" if after else f"blocks.{i}.norm2:in",
            weights=_attention(block, body) | places[i],
            rows=tokens,
            num_heads=body.num_heads,
            num_prefix=body.num_prefix,
            scale=body.head_dim**-0.5,
            rope_half=body.rope_half,
            leaves=METHODS[reduction.method].signal(dict(reduction.settings)) if after else "",
            adds_sizes=adds_sizes,
            unplaced=model.fuses,
            tokens=tokens,
            **common,
        )
        for stage in after:
            reduce = _reduce(model, config, stage, tokens, f"blocks.{i}.norm2:in")
            yield reduce
            tokens, adds_sizes = reduce.left, bool(dict(reduction.settings).get("prop_attn"))
        weights = _own(block, norm="norm2", inner_norm="mlp.norm", fc2="mlp.fc2", gamma="ls2.gamma")
        weights |= _own(block, gamma="gamma_2") | _first_linear(block, body)
        mlp: dict[str, Any] = {"act": body.act, "gated": bool(body.gated), "has_inner_norm": body.mlp_norm}
        yield Mlp(name=f"blocks.{i}.mlp", equals=f"blocks.{i}:out", weights=weights, tokens=tokens, **mlp, **common)


def _reduce(model: VisionTransformer, config: Config, stage: Stage, tokens: int, equals: str) -> Reduce:
    body, reduction = model.body, config.reduction
    number, method = reduction.stages.index(stage), METHODS[reduction.method]
    facts: dict[str, Any] = {"key_dim": body.head_dim} if reduction.merges else {}
    if stage.where == "after_attention":  # mean keys, or every head's weights
        facts["signal_size"] = tokens * (body.head_dim if reduction.merges else body.num_heads)
    facts |= {"tokens": tokens, "num_keep": stage.keep, "num_prefix": body.num_prefix, "channels": body.embed_dim}
    facts |= {"name": f"{'merge' if reduction.merges else 'prune'}.{number}", "equals": equals}
    modules = list(model.score_predictor or ())
    return method.node(number, modules, dict(reduction.settings), config.num_patches, **facts)


def _attention(block: nn.Module, body: ViT) -> Tensors:
    weights = _own(block, norm="norm1", inner_norm="attn.norm", proj="attn.proj", gamma="ls1.gamma")
    weights |= _own(block, gamma="gamma_1", q_norm="attn.q_norm", k_norm="attn.k_norm")
    if body.qkv == "qkv":
        return weights | _own(block, qkv="attn.qkv")
    own = _own(block, w="attn.qkv.weight", q="attn.q_proj", k="attn.k_proj", v="attn.v_proj")
    own |= _own(block, **{"q.bias": "attn.q_bias", "v.bias": "attn.v_bias"})
    weights["qkv.weight"] = own["w"] if "w" in own else torch.cat([own[f"{part}.weight"] for part in "qkv"])
    if any(body.has_bias(part) for part in "qkv"):
        none = weights["qkv.weight"].new_zeros(body.embed_dim)
        weights["qkv.bias"] = torch.cat([own.get(f"{part}.bias", none) for part in "qkv"])
    return weights


def _first_linear(block: nn.Module, body: ViT) -> Tensors:
    """Return the weights of the MLP's first linear; those of a gated one together, the gate first."""
    if body.gated != "split":
        return _own(block, fc1="mlp.fc1")
    split = _own(block, gate="mlp.fc1_g", up="mlp.fc1_x")
    return {f"fc1.{part}": torch.cat([split[f"gate.{part}"], split[f"up.{part}"]]) for part in ("weight", "bias")}


def _head(model: VisionTransformer, config: Config, tokens: int) -> Iterator[Node]:
    body = model.body
    common: dict[str, Any] = {"tokens": tokens, "eps": body.eps, "num_prefix": body.num_prefix}
    width: dict[str, Any] = {"channels": body.embed_dim}
    is_usual = body.pool == "token" and not (body.no_norm or body.fc_norm or body.pre_logits or body.no_head_bias)
    if is_usual and config.num_classes:
        weights = _own(model, norm="norm", head="head", head_dist="head_dist", aux_head="aux_head")
        reads: Reads = "all" if "aux_head.weight" in weights else "prefix"
        yield Head(name="head", equals=":out", weights=weights, reads=reads, **common)
        return
    weights = _own(model, last_norm="norm", fc_norm="fc_norm", pre_logits="pre_logits.fc")
    weights |= _own(model, projection="head") if body.projection else {}
    after = ":out" if not config.num_classes else "head:in"
    if body.pool.startswith("map"):
        pool = model.get_submodule("attn_pool")
        weights |= _own(
            pool, latent="latent", q="q", kv="kv", proj="proj", mlp_norm="norm", fc1="mlp.fc1", fc2="mlp.fc2"
        )
        heads: dict[str, Any] = {"num_heads": body.map_heads, "scale": (body.embed_dim // body.map_heads) ** -0.5}
        common["num_prefix"] = body.num_prefix if body.pool == "map" else 0
        yield MapPool(name="pool", equals=after, weights=weights, act=body.map_act, **heads, **common, **width)
    else:
        both = body.pool == "token" and body.class_tokens == 2 and not body.no_head_dist
        width["class_rows"] = 2 if both else 1
        yield Pool(name="pool", equals=after, weights=weights, reads=_READS[body.pool], **common, **width)
    if config.num_classes:
        yield Classify(name="head", equals=":out", weights=_unprefixed(_own(model, w="head"), "w."))


def _unprefixed(weights: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def _tensors(**named: torch.Tensor | None) -> Tensors:
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
