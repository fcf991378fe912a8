"""Small vision transformers of every kind, made from the reference model's own names, with weights by `fill`."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import dvit_infer as dvit
from dvit_infer.config import Config, Reduction
from dvit_infer.engine import Engine
from dvit_infer.graph import Graph
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.fill import fill
from dvit_infer.models.reference import Reference
from dvit_infer.models.registry import build_graph, build_reference
from dvit_infer.models.source import WeightSource
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.plain import PlainViT
from dvit_infer.reduction import METHODS
from dvit_infer.reduction.settings import Trunk

SIZE, PATCH, CLASSES = (32, 48), 8, 10  # 24 patches
CPU = torch.device("cpu")
_CLIP = {"norm_pre": True, "no_patch_bias": True, "act": "quick_gelu", "no_norm": True, "fc_norm": True}
_BEIT = {"qkv": "q_bias", "unbiased": "k", "gamma": True, "layer_scale": True, "no_pos_embed": True, "pool": "mean"}
_ROTARY = {"rope": "index", "rope_theta": 10000.0, "rope_ref": 4}
_MAP = {"pool": "map", "map_heads": 2, "map_mlp_dim": 80}

# What differs from DeiT, and the number of classes.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "deit": ({}, CLASSES),
    "clip": (_CLIP | {"projection": 40, "no_head_bias": True}, 0),
    "clip-classes": (_CLIP, CLASSES),
    "pooler": ({"pre_logits": True}, 0),
    "dinov2": ({"pool": "token_mean", "layer_scale": True}, CLASSES),
    "dinov2-registers": (
        {"num_prefix": 4, "num_registers": 3, "no_embed_registers": True, "gated": "packed", "act": "silu"}
        | {"layer_scale": True},
        0,
    ),
    "dinov3": (
        {"num_prefix": 4, "num_registers": 3, "no_pos_embed": True, "rope": "centered", "rope_half": True}
        | {"qkv": "q_proj", "unbiased": "k", "gated": "split", "act": "silu", "layer_scale": True},
        0,
    ),
    "dinov3-periods": ({"no_pos_embed": True, "rope": "centered", "rope_half": True, "rope_periods": True}, 0),
    "eva02": (
        _ROTARY
        | {"qkv": "q_proj", "unbiased": "k", "attn_norm": True, "gated": "split", "act": "silu", "mlp_norm": True}
        | {"pool": "mean", "no_norm": True, "fc_norm": True},
        CLASSES,
    ),
    "eva02-token": (_ROTARY | {"rope_xy": True, "qkv": "q_bias", "unbiased": "k", "gated": "packed"}, CLASSES),
    "mixed": ({"rope": "mixed", "rope_xy": True, "pool": "mean_all", "act": "gelu_tanh"}, CLASSES),
    "beit": (_BEIT | {"rel_pos": "blocks", "no_norm": True, "fc_norm": True}, CLASSES),
    "beit-shared": (_BEIT | {"rel_pos": "shared", "pool": "token"}, CLASSES),
    "qk-norm": ({"qk_norm": True, "no_qkv_bias": True, "fc_norm": True, "pool": "mean", "num_prefix": 0}, CLASSES),
    "siglip": (_MAP | {"num_prefix": 0, "act": "gelu_tanh", "map_act": "gelu_tanh"}, 0),
    "map-all": (_MAP | {"pool": "map_all", "act": "quick_gelu"}, CLASSES),
    "map-classes": (_MAP | {"act": "gelu_tanh", "map_act": "quick_gelu", "fc_norm": True}, CLASSES),
    "distilled": ({"num_prefix": 2}, CLASSES),
    "teacher": ({"num_prefix": 2, "no_head_dist": True}, CLASSES),
    "distilled-headless": ({"num_prefix": 2}, 0),
    "headless-mean": ({"pool": "mean", "num_prefix": 0}, 0),
}


DROPPING = ["random", pytest.param("none", marks=pytest.mark.slow), pytest.param("predictor", marks=pytest.mark.slow)]

# Together every part that a backend runs in a way of its own.
FEW = ("clip", "dinov2-registers", "eva02", "beit", "siglip", "distilled")


def every_kind(*plain: str) -> list[Any]:
    """All kinds: those of `plain` as they are, the others large."""
    return [kind if kind in plain else pytest.param(kind, marks=pytest.mark.large) for kind in KINDS]


# Reductions without training, the two usual ones first.
REDUCTIONS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"merge": 3}),
    ("evit", {}),
    ("tome", {"merge": (100, 2)}),
    ("tome", {"merge": 2, "prop_attn": False}),
    ("evit", {"fuse": False}),
    ("evit", {"score": "pooled"}),
]


def every_reduction(*quick: tuple[str, int]) -> list[Any]:
    """Cases (kind, method, settings): a usual reduction of every kind, every one of some kinds.

    Those of `quick`, a kind and the place of a reduction, are quick tests. Of the others `make test` has a usual one of
    every kind, and each of the rest once.
    """
    cases = []
    for at, kind in enumerate(KINDS):
        for i, (method, settings) in enumerate(REDUCTIONS):
            once = i == at % 2 if i < 2 else kind == FEW[i]
            if once or kind in FEW or (kind, i) in quick:
                marks = () if (kind, i) in quick else pytest.mark.slow if once else pytest.mark.large
                cases.append(pytest.param(kind, method, settings, marks=marks, id=f"{kind}-{method}-{i}"))
    return cases


@dataclass(frozen=True)
class Tiny:
    """A model of a kind: its config, the weights under timm's names, and what is built from both."""

    config: Config
    state: dict[str, torch.Tensor]

    def reference(self) -> Reference:
        return build_reference(self.config, read_checkpoint(self.state))

    def graph(self) -> Graph:
        """The graph before folding."""
        return build_graph(self.reference(), self.config)

    def engine(self, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Engine:
        checkpoint = read_checkpoint(self.state)
        source = WeightSource(self.state, checkpoint)
        return dvit.engine.Engine(self.config, checkpoint, [], CPU, dtype, source, backend)

    def images(self, batch: int = 2, seed: int = 0) -> torch.Tensor:
        return sample_images(batch, self.config.image_size, seed)

    def kept(self, batch: int) -> list[torch.Tensor]:
        """Positions to keep, others in every image."""
        order = torch.stack([torch.arange(self.config.num_patches).roll(5 * i) for i in range(batch)])
        return [order[:, :count].sort(dim=1).values for count in self.config.num_keep]


def tiny(
    kind: str,
    method: str = "none",
    size: tuple[int, int] = SIZE,
    settings: dict[str, Any] | None = None,
    **other: Any,
) -> Tiny:
    """A model of the kind, with `other` facts of the body; `method` reduces in all of its blocks, two by default."""
    different, classes = KINDS[kind]
    facts = {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_dim": 96, "eps": 1e-6} | different | other
    body = ViT(patch_size=PATCH, **facts)
    patches = size[0] // PATCH * (size[1] // PATCH)
    runs = _reduction(method, body, patches, settings or {}) if method != "none" else None
    config = Config(
        arch=kind,
        family="vit",
        num_classes=classes,
        image_size=size,
        trained_size=size,
        body=body,
        reduction=runs or Reduction(),
        learned=runs if runs and method == "predictor" else Reduction(),
        crop_pct=0.875,
    )
    return Tiny(config, _weights(config))


def _reduction(method: str, body: ViT, patches: int, given: dict[str, Any]) -> Reduction:
    trunk = Trunk(body.depth, body.embed_dim, patches, body.class_tokens)
    settings = {name: known.default(trunk) for name, known in METHODS[method].SETTINGS.items()}
    settings |= {"score": "pooled"} if "score" in settings and not body.class_tokens else {}
    settings |= given
    stages = METHODS[method].stages(settings, range(body.depth), patches)
    return Reduction(method, stages, tuple(settings.items()), patches, METHODS[method].MERGES)


@cache
def _weights(config: Config) -> dict[str, torch.Tensor]:
    body = config.body
    assert isinstance(body, ViT)
    with torch.device("meta"):
        modules = METHODS["predictor"].modules(body.embed_dim, {"predictor_eps": 1e-5}, len(config.learned.stages))
        model = PlainViT(
            body, num_classes=config.num_classes, grid=config.grid, score_predictor=modules if len(modules) else None
        )
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = torch.from_numpy(fill(name, tuple(tensor.shape)))
        if name == "rope.periods":  # as those of `rope_theta`: other signs and sizes mean nothing
            state[name] = 1.0 + torch.arange(len(tensor), dtype=torch.float32)
    return state


def agrees(runner, model, batches=(3, 1)):
    """Assert that a runner gives the reference's logits, features, tokens, feature map and kept sets."""
    for batch in batches:
        images = model.images(batch)
        with torch.no_grad():
            expected = model.reference().evaluate(images)
            grid = model.reference().feature_map(images).flatten(2).transpose(1, 2)
        out = runner.run(images)
        assert all(torch.equal(a, b) for a, b in zip(out.choices, expected.kept, strict=True))
        of_tokens = ("tokens", expected.tokens), ("feature_map", grid)
        for output, want in (("logits", expected.logits), ("features", expected.features), *of_tokens):
            found = runner.run(images, output=output).x
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, want, atol=2e-5, rtol=0)
