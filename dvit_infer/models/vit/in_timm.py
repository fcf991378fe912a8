"""Build timm's own model of a plain vision transformer; its weights have the names of the reference model."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.timm_config import timm_archs
from dvit_infer.models.vit.timm_model_args import known_args

_POOLS: dict[str, dict[str, Any]] = {
    "token": {"global_pool": "token"},
    "mean": {"global_pool": "avg"},
    "mean_all": {"global_pool": "avg", "pool_include_prefix": True},
    "map": {"global_pool": "map"},
    "map_all": {"global_pool": "map", "pool_include_prefix": True},
}


def in_timm(
    config: Config, weights: Mapping[str, torch.Tensor], beside: Mapping[str, Any], in_file: object
) -> nn.Module:
    """Return timm's model with the weights of the reference model.

    An architecture that the file names is built by that name, so that its facts are timm's and not those read here.
    Without a name it is timm's class VisionTransformer with the parts that the weights have.

    Args:
        config: the model, which reduces nothing.
        weights: of its reference model.
        beside: the JSON files beside the file; of timm's config.json, "model_args" count.
        in_file: not used.

    Raises:
        InputError: timm has no such model.
    """
    body = config.body
    assert isinstance(body, ViT)
    if body.owner == "timm" and config.arch in timm_archs():
        model = _named(config, body, beside.get("config.json"))
    elif reason := _why_not(body):
        raise InputError(f"compare: timm has no {config.arch}: {reason}; leave timm out")
    else:
        model = _by_parts(config, body)
    theirs, ours = ({key: tuple(w.shape) for key, w in of.items()} for of in (model.state_dict(), weights))
    if other := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
        shape, here = (of.get(other[0], "none") for of in (theirs, ours))
        raise InputError(
            f"compare: timm has no {config.arch}: {other[0]} has shape {shape} in its {type(model).__name__}, {here} "
            "here; leave timm out"
        )
    model.load_state_dict(dict(weights))
    return model


def _named(config: Config, body: ViT, content: object) -> nn.Module:
    import timm

    args = content.get("model_args") if isinstance(content, Mapping) else None
    given: dict[str, Any] = {"embed_dim": body.embed_dim, "depth": body.depth, "num_heads": body.num_heads}
    given |= known_args(args) | _POOLS.get(body.pool, {})
    if timm_archs()[config.arch].get("kind", "VisionTransformer") != "VisionTransformer":
        given.pop("pool_include_prefix", None)  # Eva's attention pool reads all tokens anyway
    given |= {"num_classes": config.num_classes, "img_size": config.image_size}
    model: nn.Module = timm.create_model(config.arch, **given)
    return model


def _why_not(body: ViT) -> str | None:
    """Return what timm's VisionTransformer computes in another way and keys do not show, or None."""
    is_map = body.pool.startswith("map")
    odd = {
        "its head reads the class token and the mean of the patches": body.pool not in _POOLS,
        "it has rotary positions, and no name of an architecture (--arch) says of which kind": bool(body.rope),
        "it has another attention pool": is_map and (body.map_heads, body.map_act) != (body.num_heads, body.act),
    }
    return next((what for what, is_odd in odd.items() if is_odd), None)


def _by_parts(config: Config, body: ViT) -> nn.Module:
    from timm.layers import Mlp, SwiGLUPacked
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = (VisionTransformerDistilled if body.class_tokens == 2 else VisionTransformer)(
        img_size=config.image_size,
        patch_size=body.patch_size,
        num_classes=config.num_classes,
        embed_dim=body.embed_dim,
        depth=body.depth,
        num_heads=body.num_heads,
        mlp_ratio=body.mlp_dim * (2 if body.gated else 1) / body.embed_dim,
        norm_layer=functools.partial(nn.LayerNorm, eps=body.eps),
        act_layer=body.act,  # the names are timm's
        mlp_layer=SwiGLUPacked if body.gated else Mlp,
        qkv_bias=not body.no_qkv_bias,
        qk_norm=body.qk_norm,
        scale_attn_norm=body.attn_norm,
        scale_mlp_norm=body.mlp_norm,
        init_values=1e-5 if body.layer_scale else None,
        class_token=body.class_tokens > 0,
        pos_embed="none" if body.no_pos_embed else "learn",
        no_embed_class=body.no_embed_class,
        reg_tokens=body.num_registers,
        pre_norm=body.norm_pre,
        fc_norm=body.fc_norm,
        **_POOLS[body.pool],
    )
    if body.projection:
        model.head = nn.Linear(body.embed_dim, body.projection, bias=not body.no_head_bias)
    return model
