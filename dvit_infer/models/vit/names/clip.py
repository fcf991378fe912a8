"""The names of Hugging Face's CLIP and SigLIP, whole or the vision tower alone."""

from dvit_infer.models.vit.names import orders
from dvit_infer.models.vit.names.draft import Draft, join_qkv
from dvit_infer.models.vit.names.table import Table

_TEXT = "the text tower"
_BLOCK = {
    "self_attn.q_proj.*": "attn.q.*",
    "self_attn.k_proj.*": "attn.k.*",
    "self_attn.v_proj.*": "attn.v.*",
    "self_attn.out_proj.*": "attn.proj.*",
    "layer_norm1.*": "norm1.*",
    "layer_norm2.*": "norm2.*",
    "mlp.fc1.*": "mlp.fc1.*",
    "mlp.fc2.*": "mlp.fc2.*",
}
_BESIDE = {
    "text_model.*": _TEXT,
    "text_projection.*": f"the projection of {_TEXT}",
    "logit_scale": "the scale of similarities",
    "logit_bias": "the bias of similarities",
}


def _finish_clip(draft: Draft) -> None:
    join_qkv(draft)
    why = "by the keys of Hugging Face's clip"
    draft.imply(why, owner="huggingface", model="clip", resample="huggingface", pool="token")
    if "projection.weight" in draft.state:
        draft.drop("head.", "a classifier beside a projection")
        draft.rename("projection.", "head.")
        draft.imply_projection("visual_projection is part of the pooling")
    elif draft.has("head."):
        draft.drop("fc_norm.", "CLIPForImageClassification takes the mean of the patches before it")
        draft.imply("CLIPForImageClassification's classifier reads that", pool="mean")


CLIP = Table(
    owner="huggingface",
    whose="Hugging Face's CLIP",
    anchor="embeddings.class_embedding",
    blocks=("encoder.layers.{i}.",),
    block=_BLOCK,
    rest={
        "embeddings.class_embedding": ("cls_token", orders.row),
        "embeddings.position_embedding.weight": ("pos_embed", orders.table),
        "embeddings.patch_embedding.*": "patch_embed.proj.*",
        "pre_layrnorm.*": "norm_pre.*",
        "pre_layernorm.*": "norm_pre.*",
        "post_layernorm.*": "fc_norm.*",
    },
    top={"visual_projection.weight": "projection.weight", "classifier.*": "head.*"},
    unused={},
    beside=_BESIDE,
    finish=_finish_clip,
)


def _finish_siglip(draft: Draft) -> None:
    join_qkv(draft)
    weight = draft.state.get("patch_embed.proj.weight")
    is_linear = weight is not None and weight.dim() == 2
    draft.change("patch_embed.proj.weight", orders.patches)
    for leaf in ("weight", "bias"):
        draft.split(f"attn_pool.qkv.{leaf}", [(f"attn_pool.q.{leaf}", 0, 1), (f"attn_pool.kv.{leaf}", 1, 3)], of=3)
    model = "siglip2" if is_linear else "siglip"
    why = f"by the keys of Hugging Face's {model}"
    draft.imply(why, owner="huggingface", model=model, resample="siglip2" if is_linear else "huggingface")
    if draft.has("head."):
        draft.drop("attn_pool.", "the attention pooling: the classifier reads the mean of the patches")
    draft.imply(why, pool="map" if draft.has("attn_pool.") else "mean")


SIGLIP = Table(
    owner="huggingface",
    whose="Hugging Face's SigLIP",
    anchor="embeddings.patch_embedding.weight",
    blocks=("encoder.layers.{i}.",),
    block=_BLOCK,
    rest={
        "embeddings.position_embedding.weight": ("pos_embed", orders.table),
        "embeddings.patch_embedding.*": "patch_embed.proj.*",
        "post_layernorm.*": "norm.*",
        "head.probe": ("attn_pool.latent", orders.row),
        "head.attention.in_proj_weight": "attn_pool.qkv.weight",
        "head.attention.in_proj_bias": "attn_pool.qkv.bias",
        "head.attention.out_proj.*": "attn_pool.proj.*",
        "head.layernorm.*": "attn_pool.norm.*",
        "head.mlp.fc1.*": "attn_pool.mlp.fc1.*",
        "head.mlp.fc2.*": "attn_pool.mlp.fc2.*",
    },
    top={"classifier.*": "head.*"},
    unused={},
    beside=_BESIDE,
    finish=_finish_siglip,
)
