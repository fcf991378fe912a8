"""Modules that stand for timm and transformers, which need not be here: they record what they are asked for."""

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

import dvit_infer as dvit


class StandIns:
    """Puts modules in place of packages; `given` is what their models were last made of."""

    def __init__(self, monkeypatch) -> None:
        self._monkeypatch = monkeypatch
        self.given: dict[str, Any] = {}
        self.factor = 1.0  # of transformers' answers
        self.missing: set[str] = set()  # keys that transformers does not find

    def module(self, name: str, **attributes: Any) -> None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(attributes)
        self._monkeypatch.setitem(sys.modules, name, module)

    def timm(self, build: Callable[[], torch.nn.Module]) -> None:
        """Let every model of timm be what `build` returns, with weights of zero."""

        def make(*name: str, **arguments: Any) -> torch.nn.Module:
            self.given = {"arch": name[0], **arguments} if name else arguments
            model = build()
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
            return model

        self.module("timm", create_model=make)
        self.module("timm.layers", Mlp="Mlp", SwiGLUPacked="SwiGLUPacked")
        self.module("timm.models")
        self.module("timm.models.deit", VisionTransformerDistilled=make)
        self.module("timm.models.vision_transformer", VisionTransformer=make)

    def transformers(self, kind: str, answer: str = "logits", config: str = "ViTConfig") -> None:
        """Let transformers have one class, whose models read weights by Hugging Face's names and answer so."""
        stand_in = self

        class Model(torch.nn.Module):
            config_class = type(config, (), {"from_dict": staticmethod(dict)})

            @staticmethod
            def from_pretrained(name: None, *, config: dict, state_dict: dict, **options: Any) -> tuple:
                stand_in.given = {**config, **options, "state_dict": state_dict}
                facts = {"num_heads": config["num_attention_heads"], "eps": config["layer_norm_eps"]}
                facts["act"] = config["hidden_act"].replace("pytorch_", "")
                model = Model()
                model.inner = dvit.load_reference(state_dict, assume=facts)
                return model, {"missing_keys": stand_in.missing}

            def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> Any:
                found = self.inner.evaluate(pixel_values).logits * stand_in.factor
                return types.SimpleNamespace(**{answer: found, "last_hidden_state": found[:, None]})

        silent = types.SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
        self.module("transformers", utils=types.SimpleNamespace(logging=silent), **{kind: Model})
