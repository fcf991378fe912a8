"""Meta's own names of MAE, DINO, DINOv2 and DINOv3, which are timm's but for a few, and parts of their pre-training."""

import torch

from dvit_infer.errors import InputError
from dvit_infer.models.vit.names.draft import Draft
from dvit_infer.models.vit.names.table import Table

_OF_PRETRAINING = "of pre-training alone"
_MASK = f"the token of masked patches, {_OF_PRETRAINING}"
_HEADS = {
    "mask_token": _MASK,
    "dino_head.*": f"DINO's head, {_OF_PRETRAINING}",
    "ibot_head.*": f"iBOT's head, {_OF_PRETRAINING}",
    "head.mlp.*": f"DINO's head, {_OF_PRETRAINING}",
    "head.last_layer.*": f"DINO's head, {_OF_PRETRAINING}",
}
_BLOCK = {
    "norm1.*": "norm1.*",
    "norm2.*": "norm2.*",
    "attn.qkv.*": "attn.qkv.*",
    "attn.proj.*": "attn.proj.*",
    "mlp.fc1.*": "mlp.fc1.*",
    "mlp.fc2.*": "mlp.fc2.*",
}
_REST = {
    "cls_token": "cls_token",
    "patch_embed.proj.*": "patch_embed.proj.*",
    "norm.*": "norm.*",
    "head.*": "head.*",
    "linear_head.*": "head.*",  # of torch.hub's classifiers
}


def _pool(draft: Draft) -> str:
    """Return what the head reads: torch.hub's classifiers read the class token and the mean of the patches."""
    head, width = draft.state.get("head.weight"), draft.state.get("norm.weight")
    if head is None or width is None or head.dim() != 2 or head.shape[1] == width.numel():
        return "token"
    if head.shape[1] != 2 * width.numel():
        why = f"reads {head.shape[1]} channels, of several blocks; a head of the last block's tokens is read"
        raise InputError(f"{draft.name}: {draft.files['head.weight']} {why}")
    return "token_mean"


def _finish_dinov2(draft: Draft) -> None:
    gated = any(".w12." in key for key in draft.files.values())
    why = "by the keys of Meta's DINOv2"
    draft.imply(why, owner="meta", model="dinov2", resample="meta", eps=1e-6, act="silu" if gated else "gelu")
    draft.imply(why, pool=_pool(draft))


DINOV2 = Table(
    owner="meta",
    whose="Meta's DINOv2",
    anchor="patch_embed.proj.weight",
    blocks=("blocks.{c}.{i}.", "blocks.{i}."),
    block={
        **_BLOCK,
        "ls1.gamma": "ls1.gamma",
        "ls2.gamma": "ls2.gamma",
        "mlp.w12.*": "mlp.fc1.*",
        "mlp.w3.*": "mlp.fc2.*",
    },
    rest={**_REST, "pos_embed": "pos_embed", "register_tokens": "reg_token"},
    top={},
    unused=_HEADS,
    beside={},
    finish=_finish_dinov2,
    signs=(r"\.ls1\.gamma$", r"^(mask_token|register_tokens)$|\.w12\.|^blocks\.\d+\.\d+\."),
)


def _finish_dinov3(draft: Draft) -> None:
    draft.rename_in_blocks("ls1.gamma", "gamma_1")
    draft.rename_in_blocks("ls2.gamma", "gamma_2")
    for i in range(draft.depth):
        _mask_bias(draft, f"blocks.{i}.attn.")
    why, gated = "by the keys of Meta's DINOv3", draft.mostly("mlp.fc1_g.weight")
    draft.imply(why, owner="meta", model="dinov3", rope="dinov3", eps=1e-5, act="silu" if gated else "gelu")
    draft.imply(why, pool=_pool(draft))
    periods, width = draft.state.get("rope.periods"), draft.state.get("norm.weight")
    channels = 0 if periods is None else 4 * periods.numel()
    if channels and width is not None and width.numel() % channels == 0:
        why = f"{channels // 4} periods are for heads of {channels} channels"
        draft.imply(why, num_heads=width.numel() // channels)


def _mask_bias(draft: Draft, at: str) -> None:
    """Replace a bias and its mask of zeros and ones by the bias that is used: the keys' part is masked, as a rule."""
    bias, mask = draft.state.get(f"{at}qkv.bias"), draft.state.pop(f"{at}qkv.bias_mask", None)
    key = draft.files.pop(f"{at}qkv.bias_mask", "")
    if bias is None or mask is None:
        return
    if bias.dim() != 1 or len(bias) % 3 or mask.shape != bias.shape or not ((mask == 0) | (mask == 1)).all():
        raise InputError(f"{draft.name}: {key} is no mask of zeros and ones for three biases {tuple(bias.shape)}")
    width = len(bias) // 3
    queries, keys, values = mask.view(3, width).bool()
    if queries.all() and values.all() and not keys.any():
        key = draft.files.pop(f"{at}qkv.bias")
        del draft.state[f"{at}qkv.bias"]
        for part, start in (("q_bias", 0), ("v_bias", 2 * width)):
            draft.state[at + part], draft.files[at + part] = bias[start : start + width].clone(), key
    else:
        draft.state[f"{at}qkv.bias"] = torch.where(mask.bool(), bias, torch.zeros_like(bias))


DINOV3 = DINOV2._replace(
    whose="Meta's DINOv3",
    block={
        **_BLOCK,
        "ls1.gamma": "ls1.gamma",
        "ls2.gamma": "ls2.gamma",
        "attn.qkv.bias_mask": "attn.qkv.bias_mask",
        "mlp.w1.*": "mlp.fc1_g.*",
        "mlp.w2.*": "mlp.fc1_x.*",
        "mlp.w3.*": "mlp.fc2.*",
    },
    rest={**_REST, "storage_tokens": "reg_token", "rope_embed.periods": "rope.periods"},
    unused={**_HEADS, "local_cls_norm.*": f"the norm of local crops' class tokens, {_OF_PRETRAINING}"},
    finish=_finish_dinov3,
    signs=(r"^(storage_tokens|rope_embed\.periods)$|\.attn\.qkv\.bias_mask$",),
)


def _finish_dino(draft: Draft) -> None:
    why = "by the keys of DINO's training"
    draft.imply(why, owner="meta", model="dino", resample="meta", pool="token", eps=1e-6, act="gelu")


DINO = DINOV2._replace(
    whose="DINO",
    blocks=(),
    block={},
    rest={},
    finish=_finish_dino,
    signs=(r"^((dino|ibot)_head\.|head\.(mlp|last_layer)\.)",),
    timms="",
)


def _finish_mae(draft: Draft) -> None:
    # MAE's own resampling is Hugging Face's: bicubic, without antialias.
    why = "by the keys of MAE's pre-training"
    draft.imply(why, owner="meta", model="mae", resample="huggingface", pool="token", eps=1e-6, act="gelu")


MAE = DINO._replace(
    whose="MAE",
    unused={
        "mask_token": _MASK,
        "decoder_blocks.*": f"the decoder, {_OF_PRETRAINING}",
        "decoder_embed.*": f"the decoder, {_OF_PRETRAINING}",
        "decoder_norm.*": f"the decoder, {_OF_PRETRAINING}",
        "decoder_pred.*": f"the decoder, {_OF_PRETRAINING}",
        "decoder_pos_embed": f"the decoder, {_OF_PRETRAINING}",
    },
    finish=_finish_mae,
    signs=(r"^decoder_(blocks|embed|pos_embed)",),
)

# timm's own names, or BEiT's, which are the same, with parts of pre-training.
TIMM = MAE._replace(
    owner="",
    whose="timm's model",
    unused={"mask_token": _MASK, "lm_head.*": f"the head of visual tokens, {_OF_PRETRAINING}"},
    finish=lambda draft: None,
    signs=(r"^(mask_token$|lm_head\.)",),
)
