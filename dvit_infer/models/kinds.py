"""What a checkpoint is that no family reads, by its keys or by the config.json beside it.

A family that comes to be read loses its line here.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.models.facts import text_of

# model_type in config.json, of Hugging Face's models that are read; timm's lie under a wrapper's name.
MODEL_TYPES = (
    *("vit", "deit", "beit", "vit_mae", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    *("clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
    "timm_wrapper",
)

# A family, by a pattern for the beginning of a key; of several that match, the first line counts. Prefixes that all
# keys share are stripped before.
_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"(less_less|normal)_token\.", "a Dynamic Vision Transformer (DVT), a cascade of exits"),
    (r"score_predictor\.\d+\.(in|out)_conv\.\d+\.\d+\.", "SPViT, whose token selectors have a part for each head"),
    (r"image_encoder\.", "Segment Anything (SAM)"),
    # CLIP and SigLIP.
    (r"(.*\.)?visual\.trunk\.", "open_clip's CLIP with an image tower that is no plain ViT"),
    (r"(.*\.)?visual\.(layer1|attnpool)\.", "CLIP with a ResNet for images"),
    (r"(.*\.)?(text_model|token_embedding|embeddings\.token_embedding)\.", "a text model, as CLIP and SigLIP have"),
    # Hugging Face.
    (r"(.*\.)?encoder\.stages\.\d+\.layers\.\d+\.dwconv", "Hugging Face's ConvNeXt"),
    (r"(.*\.)?embedder\.embedder\.convolution\.", "Hugging Face's ResNet"),
    (r"(.*\.)?encoder\.layers\.\d+\.blocks\.", "Hugging Face's Swin Transformer"),
    (r"(.*\.)?encoder\.layer\.\d+\.attention\.", "a transformer under Hugging Face's names"),
    # Meta's and others' ViTs.
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
    (r"layers\.\d+\.blocks\.\d+\.attn\.(logit_scale|cpb_mlp)", "Swin Transformer V2"),
    (r"(.*\.)?attn\.(pool_[qkv]|rel_pos_[hw]|rel_pos_t)", "MViT"),
    (r"stages\.\d+\.(blocks\.)?\d+\.(mlp\.)?grn\.", "ConvNeXt V2"),
    (r"features\.\d+\.\d+\.layer_scale", "torchvision's ConvNeXt"),
    (r"stages\.\d+\.blocks\.\d+\.attn_(block|grid)", "MaxViT"),
    (r"(.*\.)?token_mixer\.", "MetaFormer"),
    (r"features\.\d+\.\d+\.attn\.", "torchvision's Swin Transformer"),
    # Convolutional networks.
    (r"layer1\.\d+\.", "ResNet or another convolutional network"),
    (r"s1\.b1\.", "RegNet"),
    (r"blocks\.\d+\.\d+\.(conv|bn|se)", "EfficientNet or another convolutional network"),
    (r"features\.", "a convolutional network of torchvision"),
)


def check_kind(name: str, beside: Mapping[str, Any]) -> None:
    """Raise InputError if the config.json beside weights is of another model than a vision transformer that is read."""
    config = beside.get("config.json")
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind in MODEL_TYPES:
        return
    classes = config.get("architectures") if isinstance(config, Mapping) else None
    called = next((text for text in classes if isinstance(text, str)), "") if isinstance(classes, list) else ""
    short = re.split(r"(?<=.)(?=For[A-Z]|With[A-Z]|Model|Backbone|LMHead)", called)[0] or kind
    details = f"model_type {text_of(kind)[:40]!r}{', ' if called else ''}{text_of(called)[:60]}"
    raise InputError(f"{name}: is a {text_of(short)[:40]} model ({details}); vision transformers are read")


def code_beside(folder: Path | None, beside: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return what of a model is code, which Hugging Face's trust_remote_code would run, and that it is not run."""
    why = "code beside the weights is never run"
    files = sorted(file.name for file in folder.glob("*.py")) if folder is not None else []
    config = beside.get("config.json")
    named = isinstance(config, Mapping) and "auto_map" in config
    found = [", ".join(map(text_of, files[:5]))] if files else []
    return tuple((what, why) for what in [*found, *(["auto_map of config.json"] if named else [])])


def is_timms(keys: Iterable[str]) -> bool:
    """Return whether keys are those of timm's vision transformers or of models that call their parts so."""
    found = {key.partition(".")[0] for key in keys}
    return {"blocks", "patch_embed"} <= found


def describe(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the family that keys are of and a key that shows it, or None if it is not known either."""
    keys = list(keys)
    for pattern, family in _FAMILIES:
        begins = re.compile(pattern)
        if key := next((key for key in keys if begins.match(key)), None):
            return family, key
    return None
