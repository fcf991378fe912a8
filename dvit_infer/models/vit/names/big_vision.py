"""The names of JAX's vision_transformer and big_vision, whose .npz files hold Flax's kernels (in, out)."""

from collections.abc import Mapping
from typing import Any

import torch

from dvit_infer.errors import InputError
from dvit_infer.models.vit.names import orders
from dvit_infer.models.vit.names.draft import QKV, Draft, join_qkv
from dvit_infer.models.vit.names.table import Rows, Table

_STACKED = "Transformer/encoderblock/"
_MOST_BLOCKS = 1000
_PARTS = (("query", "q"), ("key", "k"), ("value", "v"))


def unstacked(named: Mapping[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Return entries with the blocks that lie stacked in one tensor apart, as files have them that do not stack."""
    found: dict[str, tuple[str, Any]] = {}
    for key, (in_file, value) in named.items():
        before, stacked, part = key.partition(_STACKED)
        if not stacked or not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) > _MOST_BLOCKS:
            found[key] = in_file, value
            continue
        for i in range(len(value)):
            found[f"{before}Transformer/encoderblock_{i}/{part}"] = in_file, value[i]
    return found


def _norm(flax: str, ours: str) -> dict[str, str]:
    return {f"{flax}/scale": f"{ours}.weight", f"{flax}/bias": f"{ours}.bias"}


def _dense(flax: str, ours: str) -> Rows:
    return {f"{flax}/kernel": (f"{ours}.weight", orders.transposed), f"{flax}/bias": f"{ours}.bias"}


def _attention(flax: str, ours: str) -> Rows:
    rows: dict[str, Any] = {}
    for name, part in _PARTS:
        rows[f"{flax}/{name}/kernel"] = f"{ours}.{part}.weight", orders.from_heads
        rows[f"{flax}/{name}/bias"] = f"{ours}.{part}.bias", orders.flat
    return {
        **rows,
        f"{flax}/out/kernel": (f"{ours}.proj.weight", orders.to_width),
        f"{flax}/out/bias": f"{ours}.proj.bias",
    }


def _finish(draft: Draft) -> None:
    seen = {
        shape[1] for i in range(draft.depth) if len(shape := draft.shapes.get(f"blocks.{i}.attn.q.weight", ())) == 3
    }
    if len(seen) > 1:
        raise InputError(
            f"{draft.name}: its blocks have different numbers of heads: {', '.join(map(str, sorted(seen)))}"
        )
    draft.imply("the shape of query/kernel", **({"num_heads": seen.pop()} if seen else {}))
    if len(shape := draft.shapes.get("attn_pool.q.weight", ())) == 3:
        draft.imply("the shape of MAPHead_0's query/kernel", map_heads=shape[1])
    join_qkv(draft)
    for leaf in ("weight", "bias"):
        if f"attn_pool.k.{leaf}" in draft.state or f"attn_pool.v.{leaf}" in draft.state:
            draft.join(f"attn_pool.kv.{leaf}", [f"attn_pool.{part}.{leaf}" for part in QKV[1:]])
    why = "by the keys of JAX's vision_transformer and big_vision"
    has_class = "cls_token" in draft.state
    pool = "map" if draft.has("attn_pool.") else "token" if has_class else "mean"
    draft.imply(why, owner="big_vision", model="vit", resample="big_vision", pool=pool, eps=1e-6)
    draft.imply("as Flax computes it", act="gelu_tanh")
    draft.imply("JAX's vision_transformer and big_vision scale pixels to -1..1", mean=(0.5,) * 3, std=(0.5,) * 3)
    if draft.files.get("pos_embed", "").endswith("posembed_input/pos_embedding"):
        draft.imply("Transformer/posembed_input has a row for the class token", no_embed_class=False)
    elif has_class:
        draft.imply("big_vision's pos_embedding is the patches' alone", no_embed_class=True)
    draft.check_pre_logits()
    if draft.prefix.endswith("img/"):
        draft.imply_projection("the head of an image tower is a projection")


BIG_VISION = Table(
    owner="big_vision",
    whose="the ViT of JAX's vision_transformer and big_vision",
    anchor="embedding/kernel",
    blocks=("Transformer/encoderblock_{i}/",),
    block={
        **_norm("LayerNorm_0", "norm1"),
        **_attention("MultiHeadDotProductAttention_0", "attn"),
        **_norm("LayerNorm_1", "norm2"),
        **_dense("MlpBlock_0/Dense_0", "mlp.fc1"),
        **_dense("MlpBlock_0/Dense_1", "mlp.fc2"),
        # vision_transformer, AugReg
        **_attention("MultiHeadDotProductAttention_1", "attn"),
        **_norm("LayerNorm_2", "norm2"),
        **_dense("MlpBlock_3/Dense_0", "mlp.fc1"),
        **_dense("MlpBlock_3/Dense_1", "mlp.fc2"),
    },
    rest={
        "embedding/kernel": ("patch_embed.proj.weight", orders.flax_patches),
        "embedding/bias": "patch_embed.proj.bias",
        "cls": ("cls_token", orders.row),
        "pos_embedding": ("pos_embed", orders.table),
        "Transformer/posembed_input/pos_embedding": ("pos_embed", orders.table),
        **_norm("Transformer/encoder_norm", "norm"),
        **_dense("pre_logits", "pre_logits.fc"),
        **_dense("head", "head"),
        "MAPHead_0/probe": ("attn_pool.latent", orders.row),
        **_attention("MAPHead_0/MultiHeadDotProductAttention_0", "attn_pool"),
        **_norm("MAPHead_0/LayerNorm_0", "attn_pool.norm"),
        **_dense("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
        **_dense("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
    },
    top={},
    unused={},
    beside={
        "params/txt/*": "the text tower",
        "params/t": "the scale of similarities",
        "params/b": "the bias of similarities",
        "opt/state/*": "the optimiser's state",
    },
    finish=_finish,
)
