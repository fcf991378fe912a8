"""Build the class of transformers that a vision transformer is, and load its weights as transformers does."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models.family import State
from dvit_infer.models.vit.body import ViT

# The class without a classifier, and the one with.
_CLASSES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "vit_mae": ("ViTModel", "ViTForImageClassification"),  # MAE's own class shuffles the patches
    "deit": ("DeiTModel", "DeiTForImageClassification"),
    "beit": ("BeitModel", "BeitForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", None),
    "clip": ("CLIPVisionModel", "CLIPForImageClassification"),
    "siglip": ("SiglipVisionModel", "SiglipForImageClassification"),
}
_WITH_POOLER = ("ViTModel", "DeiTModel")  # an option of theirs
# Of a config, what says how a model is loaded, and its type, which the class has.
_NOT_TAKEN = (
    *("auto_map", "quantization_config", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation"),
    *("model_type", "transformers_weights"),
)
_ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
# Where transformers' ViT and DeiT have what timm calls so; queries, keys and values are joined there.
_PARTS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_PARTS_OF_BLOCKS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")


class Answering(nn.Module):
    """A model of transformers whose forward takes images and returns logits, or the embedding, alone."""

    def __init__(self, model: nn.Module, resamples: bool) -> None:
        super().__init__()
        takes = inspect.signature(model.forward).parameters
        self.model = model
        self.options = {"interpolate_pos_encoding": True} if resamples and "interpolate_pos_encoding" in takes else {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.model(images, **self.options)
        for name in ("logits", "image_embeds", "pooler_output"):
            answer: torch.Tensor | None = getattr(out, name, None)
            if answer is not None:
                return answer
        first: torch.Tensor = out.last_hidden_state[:, 0]
        return first


def in_transformers(
    config: Config, weights: State, beside: Mapping[str, Any], in_file: Callable[[], State]
) -> nn.Module:
    """Return a model of transformers with PyTorch's fused attention; it takes images and returns logits or embedding.

    A file of Hugging Face's becomes the class that its config.json describes, with the weights by their names in the
    file. A DeiT, or ViT, of another owner becomes transformers' class of that name, with renamed weights.

    Args:
        config: the model, which reduces nothing.
        weights: of its reference model.
        beside: the JSON files beside its weights.
        in_file: returns the weights by their names in the file.

    Raises:
        InputError: transformers has no such model, or nothing says which it is.
    """
    body, content = config.body, beside.get("config.json")
    assert isinstance(body, ViT)
    if body.owner == "huggingface" and isinstance(content, Mapping) and "model_type" in content:
        return _of_its_config(config, body, content, in_file)
    if reason := _why_not(config, body):
        raise InputError(f"compare: transformers has no {config.arch}: {reason}; leave transformers out")
    facts = {
        "hidden_size": body.embed_dim,
        "num_hidden_layers": body.depth,
        "num_attention_heads": body.num_heads,
        "intermediate_size": body.mlp_dim,
        "hidden_act": _ACTS[body.act],
        "layer_norm_eps": body.eps,
        "image_size": list(config.image_size),
        "patch_size": body.patch_size,
        "qkv_bias": not body.no_qkv_bias,
    }
    model_type = "deit" if body.class_tokens == 2 else "vit"
    renamed = _renamed(weights, config, model_type)
    return Answering(_load(_class_of(model_type, config, body), facts, config, body, renamed), resamples=False)


def _of_its_config(config: Config, body: ViT, content: Mapping[str, Any], in_file: Callable[[], State]) -> nn.Module:
    name = _class_of(str(content["model_type"]).removesuffix("_vision_model"), config, body)
    return Answering(_load(name, content, config, body, in_file()), config.image_size != config.trained_size)


def _class_of(model_type: str, config: Config, body: ViT) -> str:
    name = _CLASSES.get(model_type, (None, None))[config.num_classes > 0]
    if name is None:
        raise InputError(f"compare: transformers has no {model_type} that answers images so; leave transformers out")
    if body.projection:
        return "CLIPVisionModelWithProjection"
    return f"{name}WithTeacher" if name == "DeiTForImageClassification" and not body.no_head_dist else name


def _load(name: str, facts: Mapping[str, Any], config: Config, body: ViT, state: State) -> nn.Module:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, name)
    if kind.config_class.__name__.endswith("VisionConfig"):
        facts = next((facts[key] for key in ("vision_config_dict", "vision_config") if facts.get(key)), facts)
    facts = {key: value for key, value in facts.items() if key not in _NOT_TAKEN}
    if config.num_classes:
        facts = {**facts, "id2label": {i: str(i) for i in range(config.num_classes)}, "label2id": {}}
    elif body.projection:
        facts = {**facts, "projection_dim": body.projection}
    options = {"add_pooling_layer": body.pre_logits} if name in _WITH_POOLER else {}
    model, loading = kind.from_pretrained(
        None,
        config=kind.config_class.from_dict(facts),
        state_dict=state,
        attn_implementation="sdpa",
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(loading["missing_keys"]):  # it would be random
        raise InputError(
            f"compare: transformers finds no {missing[0]} in the file for its {name}; leave transformers out"
        )
    built: nn.Module = model
    return built


def _why_not(config: Config, body: ViT) -> str | None:
    """Return what transformers' ViT and DeiT compute in another way and keys do not show, or None."""
    if body.owner == "huggingface" and not config.arch.startswith(("vit", "deit")):
        return "its config.json would say which class it is"
    if body.pool != "token" or not body.class_tokens or (body.class_tokens == 2 and not config.num_classes):
        return "its ViT answers by the class token"
    if body.no_embed_class or body.no_pos_embed or body.rope or body.no_norm or body.skip_lam != 1:
        return "its ViT has learned positions for all tokens, a last norm and no scale of branches"
    return None


def _renamed(weights: State, config: Config, model_type: str) -> State:
    """Return weights by the names that transformers writes for a ViT or a DeiT."""
    top = f"{model_type}." if config.num_classes else ""
    parts = {name: f"{top}{part}" for name, part in _PARTS.items()}
    has_two = "head_dist.weight" in weights
    parts |= {"head": "cls_classifier" if has_two else "classifier", "head_dist": "distillation_classifier"}
    for i in range(config.body.depth):
        parts |= {f"blocks.{i}.{name}": f"{top}encoder.layer.{i}.{part}" for name, part in _PARTS_OF_BLOCKS.items()}
    found: State = {}
    for key, weight in weights.items():
        module, _, leaf = key.rpartition(".")
        block = module.removesuffix(".attn.qkv").removeprefix("blocks.")
        if key in parts:
            found[parts[key]] = weight
        elif module in parts:
            found[f"{parts[module]}.{leaf}"] = weight
        elif module.endswith(".attn.qkv"):
            names = (f"{top}encoder.layer.{block}.attention.attention.{part}.{leaf}" for part in _QKV)
            found |= zip(names, weight.chunk(3), strict=True)
        else:
            raise InputError(
                f"compare: transformers has no {config.arch}: its ViT has no {key}; leave transformers out"
            )
    return found
