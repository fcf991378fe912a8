"""What a checkpoint is that no family reads: other model families, and parts that change a ViT's function.

A family that comes to be read loses its line here.
"""

import re
from collections.abc import Iterable, Mapping

# A family, by a pattern for the beginning of a key; of several that match, the first line counts. Prefixes that all
# keys share are stripped before.
_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"storage_tokens|rope_embed\.", "DINOv3, as Meta saves it"),
    (r"mask_token$", "DINOv2 or another model of masked images, in pre-training"),
    (r"(less_less|normal)_token\.", "a Dynamic Vision Transformer (DVT), a cascade of exits"),
    (r"score_predictor\.\d+\.(in|out)_conv\.\d+\.\d+\.", "SPViT, whose token selectors have a part for each head"),
    (r"image_encoder\.", "Segment Anything (SAM)"),
    # CLIP and SigLIP.
    (r"(.*\.)?visual\.trunk\.", "open_clip's CLIP with an image tower of timm"),
    (r"(.*\.)?visual\.(class_embedding|conv1\.|transformer\.)", "CLIP, as OpenAI and open_clip save it"),
    (r"(.*\.)?embeddings\.class_embedding", "Hugging Face's CLIP"),
    (r"(.*\.)?(vision_model|embeddings\.patch_embedding)\.", "Hugging Face's SigLIP"),
    (r"(.*\.)?text_model\.", "a text model of Hugging Face's CLIP or SigLIP"),
    # Hugging Face.
    (r"(.*\.)?decoder\.decoder_layers\.", "Hugging Face's ViT-MAE, with its decoder"),
    (r"(.*\.)?embeddings\.distillation_token", "Hugging Face's DeiT"),
    (r"(.*\.)?encoder\.stages\.\d+\.layers\.\d+\.dwconv", "Hugging Face's ConvNeXt"),
    (r"(.*\.)?embeddings\.patch_embeddings\.weight", "Hugging Face's DINOv3"),
    (r"(.*\.)?embeddings\.register_tokens", "Hugging Face's DINOv2 with register tokens"),
    (r"(.*\.)?layer_scale1\.lambda1", "Hugging Face's DINOv2"),
    (r"(.*\.)?encoder\.layer\.\d+\.lambda_1", "Hugging Face's BEiT"),
    (r"(.*\.)?encoder\.layers\.\d+\.blocks\.", "Hugging Face's Swin Transformer"),
    (r"(.*\.)?embeddings\.patch_embeddings\.projection", "Hugging Face's ViT"),
    (r"(.*\.)?encoder\.layer\.\d+\.attention\.", "a transformer under Hugging Face's names"),
    # Meta's and others' ViTs.
    (r"decoder_(blocks|embed|pos_embed)", "MAE in pre-training: encoder and decoder, and no classifier"),
    (r"(blocks\.\d+\.attn\.relative_position|rel_pos_bias\.)", "BEiT"),
    (r"blocks\.\d+\.attn\.q_bias", "BEiT, EVA or timm's DINOv3, whose q_bias and v_bias are apart"),
    (r"rope\.|blocks\.\d+\.(mlp\.(fc1_g|w1|w12)|attn\.q_proj)\.", "EVA or another ViT with rotary positions or gates"),
    (r"attn_pool\.", "timm's ViT with attention pooling, such as SigLIP"),
    (r"encoder\.layers\.encoder_layer_\d+\.", "torchvision's ViT"),
    (r"patch_embed\.backbone\.", "a hybrid of a convolutional network and a ViT"),
    (r"blocks_token_only\.", "CaiT"),
    (r"cls_attn_blocks\.", "XCiT"),
    (r"tokens_to_token\.", "T2T-ViT"),
    (r"blocks\.\d+\.blocks\.", "CrossViT"),
    (r"pixel_embed\.", "TNT"),
    (r"transformers\.\d+\.", "PiT"),
    (r"patch_embeds\.|block1\.\d+\.|patch_embed1\.", "PVT or Twins"),
    (r"network\.\d+\.", "VOLO or PoolFormer"),
    (r"blocks\.\d+\.(mlp_tokens|linear_tokens)\.", "MLP-Mixer or ResMLP"),
    # Hierarchical models.
    (r"layers\.\d+\.(score_predictor|blocks\.\d+\.fastmlp)\.", "DynamicSwin"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.(logit_scale|cpb_mlp)", "Swin Transformer V2"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.", "Swin Transformer"),
    (r"(.*\.)?attn\.(pool_[qkv]|rel_pos_[hw]|rel_pos_t)", "MViT"),
    (r"stages\.\d+\.\d+\.fast_path", "DynamicConvNeXt"),
    (r"stages\.\d+\.\d+\.dwconv|stages\.\d+\.blocks\.\d+\.conv_dw|features\.\d+\.\d+\.layer_scale", "ConvNeXt"),
    (r"stages\.\d+\.blocks\.\d+\.attn_(block|grid)", "MaxViT"),
    (r"(.*\.)?token_mixer\.", "MetaFormer"),
    (r"features\.\d+\.\d+\.attn\.", "torchvision's Swin Transformer"),
    # Convolutional networks.
    (r"layer1\.\d+\.", "ResNet or another convolutional network"),
    (r"s1\.b1\.", "RegNet"),
    (r"blocks\.\d+\.\d+\.", "EfficientNet or another convolutional network"),
    (r"features\.", "a convolutional network of torchvision"),
)

# Parts that a plain ViT does not have, by a pattern for a whole key.
_PARTS: tuple[tuple[str, str], ...] = (
    (r"(reg_token|register_tokens)", "it has register tokens"),
    (r"fc_norm\..*", "its head reads the mean of the patches behind that norm, as fine-tuned MAE and BEiT do"),
    (r"norm_pre\..*", "it has a LayerNorm before its blocks, as CLIP has"),
    (r"pre_logits\..*", "it has one more layer before its head, as some models of ImageNet-21k have"),
    (r"blocks\.\d+\.attn\.[qk]_norm\..*", "its queries and keys are normalised"),
    (r"blocks\.\d+\.(attn|mlp)\.norm\..*", "it has LayerNorms inside its blocks' branches"),
)


def describe(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the family that keys are of and a key that shows it, or None if it is not known either."""
    keys = list(keys)
    if "mask_token" in keys and any(key.endswith("ls1.gamma") for key in keys):
        return "DINOv2, as Meta saves it", "mask_token"
    for pattern, family in _FAMILIES:
        begins = re.compile(pattern)
        if key := next((key for key in keys if begins.match(key)), None):
            return family, key
    return None


def unsupported_part(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return what a ViT has that changes its function and is not supported; None: nothing that is known here."""
    for pattern, what in _PARTS:
        whole = re.compile(pattern)
        if key := next((key for key in shapes if whole.fullmatch(key)), None):
            return f"unexpected key {key}: {what}; that is not supported yet"
    inner, outer = (shapes.get(f"blocks.0.mlp.{fc}.weight", ()) for fc in ("fc1", "fc2"))
    if len(inner) == len(outer) == 2 and inner[0] == 2 * outer[1]:
        return "blocks.0.mlp.fc1.weight has twice the rows that fc2 reads: a gated MLP, which is not supported yet"
    return None
