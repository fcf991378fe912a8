"""The names of Hugging Face's ViT, DeiT, BEiT, ViT-MAE, DINOv2 and DINOv3, on disk and in memory (transformers 5)."""

from dvit_infer.errors import InputError
from dvit_infer.models.facts import NOT_YET
from dvit_infer.models.vit.names.draft import Draft, join_qkv, separate_qkv
from dvit_infer.models.vit.names.table import Table

_OF_PRETRAINING = "of pre-training alone"
_BY_KEYS = "by the keys of Hugging Face's"

_ATTENTION = {
    "attention.attention.query.*": "attn.q.*",
    "attention.attention.key.*": "attn.k.*",
    "attention.attention.value.*": "attn.v.*",
    "attention.output.dense.*": "attn.proj.*",
    "attention.q_proj.*": "attn.q.*",
    "attention.k_proj.*": "attn.k.*",
    "attention.v_proj.*": "attn.v.*",
    "attention.o_proj.*": "attn.proj.*",
}
_UNUSED = {"embeddings.mask_token": f"the token of masked patches, {_OF_PRETRAINING}"}
_DECODER = {
    "decoder.decoder_*": f"MAE's decoder, {_OF_PRETRAINING}",
    "decoder.*": f"the decoder, {_OF_PRETRAINING}",
}


def _finish_vit(draft: Draft) -> None:
    join_qkv(draft)
    biases = draft.has("rel_pos_bias.") or draft.mostly("attn.relative_position_bias_table")
    is_beit = biases or draft.has("fc_norm.") or draft.mostly("gamma_1")
    model = "deit" if "dist_token" in draft.state else "beit" if is_beit else "vit"
    if any(key.endswith("decoder.decoder_*") for key in draft.left_over):
        model = "vit_mae"
    if draft.has("head."):
        draft.drop("pre_logits.", "the pooler, which the classifier does not read")
    draft.check_pre_logits()
    tables = [key for key in draft.state if key.endswith("relative_position_bias_table")]
    of_blocks = [draft.files[key] for key in tables if key.startswith("blocks.")]
    if of_blocks and len(of_blocks) < len(tables):
        raise InputError(
            f"{draft.name}: {of_blocks[0]}: relative positions of a block beside those that all blocks share are not "
            f"supported; {NOT_YET}"
        )
    draft.imply(
        f"{_BY_KEYS} {model}",
        owner="huggingface",
        model=model,
        resample="huggingface",
        pool="mean" if draft.has("fc_norm.") else "token",
    )


VIT = Table(
    owner="huggingface",
    whose="Hugging Face's ViT, DeiT or BEiT",
    anchor="embeddings.patch_embeddings.projection.weight",
    blocks=("encoder.layer.{i}.", "layers.{i}."),
    block={
        **_ATTENTION,
        "layernorm_before.*": "norm1.*",
        "layernorm_after.*": "norm2.*",
        "intermediate.dense.*": "mlp.fc1.*",
        "output.dense.*": "mlp.fc2.*",
        "mlp.fc1.*": "mlp.fc1.*",
        "mlp.fc2.*": "mlp.fc2.*",
        "lambda_1": "gamma_1",
        "lambda_2": "gamma_2",
        "attention.attention.relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
        "relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
    },
    rest={
        "embeddings.cls_token": "cls_token",
        "embeddings.distillation_token": "dist_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.*": "patch_embed.proj.*",
        "encoder.relative_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
        "shared_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
        "layernorm.*": "norm.*",
        "pooler.layernorm.*": "fc_norm.*",
        "pooler.dense.*": "pre_logits.fc.*",
    },
    top={
        "classifier.*": "head.*",
        "cls_classifier.*": "head.*",
        "distillation_classifier.*": "head_dist.*",
    },
    unused=_UNUSED,
    beside={
        **_DECODER,
        "lm_head.*": f"the head of visual tokens, {_OF_PRETRAINING}",
        "layernorm.*": f"the norm before the head of visual tokens, {_OF_PRETRAINING}",
    },
    finish=_finish_vit,
)


def _finish_dinov2(draft: Draft) -> None:
    join_qkv(draft)
    for i in range(draft.depth):
        for leaf in ("weight", "bias"):
            at = f"blocks.{i}.mlp."
            if f"{at}gate.{leaf}" in draft.files:
                draft.join(f"{at}fc1.{leaf}", [f"{at}gate.{leaf}", f"{at}up.{leaf}"])
    without = any(key.endswith("embeddings.register_tokens") for key in draft.left_over)  # of the class with registers
    model = "dinov2_with_registers" if without or "reg_token" in draft.state else "dinov2"
    why = f"{_BY_KEYS} {model}"
    draft.imply(why, owner="huggingface", model=model, resample="timm" if without else "huggingface")
    draft.imply(why, pool="token_mean" if draft.has("head.") else "token")
    first, second = (draft.state.get(f"blocks.0.mlp.{fc}.weight") for fc in ("fc1", "fc2"))
    if first is not None and second is not None and second.dim() == 2 and first.shape[:1] == (2 * second.shape[1],):
        draft.imply("its gated MLP has no other activation", act="silu")


DINOV2 = Table(
    owner="huggingface",
    whose="Hugging Face's DINOv2",
    anchor="embeddings.patch_embeddings.projection.weight",
    blocks=("encoder.layer.{i}.",),
    block={
        **_ATTENTION,
        "norm1.*": "norm1.*",
        "norm2.*": "norm2.*",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.fc1.*": "mlp.fc1.*",
        "mlp.fc2.*": "mlp.fc2.*",
        "mlp.weights_in.*": "mlp.fc1.*",
        "mlp.weights_out.*": "mlp.fc2.*",
        "mlp.gate_proj.*": "mlp.gate.*",
        "mlp.up_proj.*": "mlp.up.*",
        "mlp.down_proj.*": "mlp.fc2.*",
    },
    rest={
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.*": "patch_embed.proj.*",
        "layernorm.*": "norm.*",
    },
    top={"classifier.*": "head.*"},
    unused=_UNUSED,
    beside={},
    finish=_finish_dinov2,
    signs=(r"\.layer_scale1\.lambda1$",),
)


def _finish_dinov3(draft: Draft) -> None:
    separate_qkv(draft)
    is_gated = draft.mostly("mlp.gate.weight")
    draft.rename_in_blocks("mlp.gate.", "mlp.fc1_g.")
    draft.rename_in_blocks("mlp.up.", "mlp.fc1_x." if is_gated else "mlp.fc1.")
    draft.imply(f"{_BY_KEYS} dinov3_vit", owner="huggingface", model="dinov3_vit", pool="token", rope="dinov3")


DINOV3 = Table(
    owner="huggingface",
    whose="Hugging Face's DINOv3",
    anchor="embeddings.patch_embeddings.weight",
    blocks=("layer.{i}.", "model.layer.{i}."),
    block={
        **_ATTENTION,
        "norm1.*": "norm1.*",
        "norm2.*": "norm2.*",
        "layer_scale1.lambda1": "gamma_1",
        "layer_scale2.lambda1": "gamma_2",
        "mlp.gate_proj.*": "mlp.gate.*",
        "mlp.up_proj.*": "mlp.up.*",
        "mlp.down_proj.*": "mlp.fc2.*",
    },
    rest={
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings.*": "patch_embed.proj.*",
        "norm.*": "norm.*",
    },
    top={"classifier.*": "head.*"},
    unused={**_UNUSED, "rope_embeddings.inv_freq": "rotary frequencies, which the config gives"},
    beside={},
    finish=_finish_dinov3,
)
