"""The names of OpenAI's CLIP and of open_clip, whole or the vision tower alone, and of torchvision's ViT."""

from dvit_infer.models.vit.names import orders
from dvit_infer.models.vit.names.draft import Draft
from dvit_infer.models.vit.names.table import Table

_TEXT = "the text tower"
# How OpenAI and open_clip prepare images; transformers' and timm's copies of the weights say the same.
_IMAGES = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}
_BESIDE = {
    "text.*": _TEXT,
    "transformer.*": _TEXT,
    "token_embedding.*": _TEXT,
    "positional_embedding": _TEXT,
    "ln_final.*": _TEXT,
    "attn_mask": _TEXT,
    "text_projection": f"the projection of {_TEXT}",
    "text_projection.*": f"the projection of {_TEXT}",
    "logit_scale": "the scale of similarities",
    "logit_bias": "the bias of similarities",
    "input_resolution": "a number of OpenAI's files",
    "context_length": "a number of OpenAI's files",
    "vocab_size": "a number of OpenAI's files",
}


def _finish(draft: Draft) -> None:
    draft.imply("by the keys of open_clip", owner="open_clip", model="clip", resample="timm", pool="token", eps=1e-5)
    draft.imply("CLIP's", **_IMAGES)
    if "input_resolution" in draft.left_over:
        draft.imply("OpenAI's own file, by the key input_resolution", act="quick_gelu")
    draft.imply_projection("visual.proj is part of the pooling")


OPEN_CLIP = Table(
    owner="open_clip",
    whose="CLIP as OpenAI and open_clip save it",
    anchor="conv1.weight",
    blocks=("transformer.resblocks.{i}.",),
    block={
        "ln_1.*": "norm1.*",
        "ln_2.*": "norm2.*",
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj.*": "attn.proj.*",
        "mlp.c_fc.*": "mlp.fc1.*",
        "mlp.c_proj.*": "mlp.fc2.*",
        "ls_1.gamma": "ls1.gamma",
        "ls_2.gamma": "ls2.gamma",
    },
    rest={
        "class_embedding": ("cls_token", orders.row),
        "positional_embedding": ("pos_embed", orders.table),
        "conv1.*": "patch_embed.proj.*",
        "ln_pre.*": "norm_pre.*",
        "ln_post.*": "norm.*",
        "proj": ("head.weight", orders.transposed),
    },
    top={},
    unused={},
    beside=_BESIDE,
    finish=_finish,
)


def _finish_trunk(draft: Draft) -> None:
    draft.imply("by the keys of open_clip", owner="open_clip", model="clip", resample="timm")
    if draft.has("attn_pool."):
        draft.imply("by the keys attn_pool", pool="map")
    draft.imply_projection("the head of a tower is a projection")


TRUNK = OPEN_CLIP._replace(
    whose="open_clip's CLIP with an image tower of timm",
    anchor="trunk.patch_embed.proj.weight",
    blocks=(),
    block={},
    rest={"head.proj.*": "head.*"},
    finish=_finish_trunk,
    timms="trunk.",
)


def _finish_torchvision(draft: Draft) -> None:
    why = "by the keys of torchvision's ViT"
    draft.imply(why, owner="torchvision", model="vit", resample="torchvision", pool="token", eps=1e-6, act="gelu")
    draft.check_pre_logits()


TORCHVISION = Table(
    owner="torchvision",
    whose="torchvision's ViT",
    anchor="conv_proj.weight",
    blocks=("encoder.layers.encoder_layer_{i}.",),
    block={
        "ln_1.*": "norm1.*",
        "ln_2.*": "norm2.*",
        "self_attention.in_proj_weight": "attn.qkv.weight",
        "self_attention.in_proj_bias": "attn.qkv.bias",
        "self_attention.out_proj.*": "attn.proj.*",
        "mlp.0.*": "mlp.fc1.*",
        "mlp.3.*": "mlp.fc2.*",
        "mlp.linear_1.*": "mlp.fc1.*",
        "mlp.linear_2.*": "mlp.fc2.*",
    },
    rest={
        "class_token": ("cls_token", orders.row),
        "conv_proj.*": "patch_embed.proj.*",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln.*": "norm.*",
        "heads.pre_logits.*": "pre_logits.fc.*",
        "heads.head.*": "head.*",
    },
    top={},
    unused={},
    beside={},
    finish=_finish_torchvision,
)
