"""Modules of timm and transformers as sources."""

import pytest
import torch
from golden_cases import official_checkpoint
from owners_files import State, file_of, same

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.source import WeightSource

VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
PLAIN: State = {k: w for k, w in official_checkpoint("tiny-deit-r0.7-s1")["model"].items() if "predictor" not in k}


class Config:
    def to_dict(self) -> dict[str, object]:
        return {**VIT, "architectures": None, "id2label": {0: "cat", 1: "dog"}}


class FakeViT(torch.nn.Module):
    """A module with the names of a state dict, of a class that calls itself transformers'."""

    __module__ = "transformers.models.fake"

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, tensor in state.items():
            *path, leaf = key.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))


def test_a_module_of_transformers():
    file = file_of("hf-vit-tiny")
    model = FakeViT(file)
    model.config = Config()
    found = read_checkpoint(model)
    assert same(found, read_checkpoint(file))
    assert found.name == "FakeViT"
    assert found.beside["config.json"]["architectures"] == ["FakeViT"]
    assert found.beside["config.json"]["id2label"] == {0: "cat", 1: "dog"}
    assert found.origin["classifier.bias"].data_ptr() == model.classifier.bias.data_ptr()
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert same(read_checkpoint(wrapper), found)
    assert read_checkpoint(wrapper).beside == found.beside
    source = WeightSource(model, found)
    assert same(source.read(), found)
    model.classifier.bias.data += 1
    with pytest.raises(dvit.InputError, match="has changed"):
        source.read()
    model.config.to_dict = lambda: {"model_type": "bert"}
    with pytest.raises(dvit.InputError, match=r"FakeViT: is a FakeViT model \(model_type 'bert', FakeViT\)"):
        read_checkpoint(model)


def test_a_module_that_may_compute_something_else_is_refused():
    def model(kind=FakeViT):
        made = kind(file_of("hf-vit-tiny"))
        made.config = Config()
        return made

    class Derived(FakeViT):
        __module__ = "mine"

        def forward(self, x):
            return 0 * x

    instead = "its state_dict() given instead is read as the model that its keys name"
    with pytest.raises(dvit.InputError) as caught:
        read_checkpoint(model(Derived))
    said = "Derived: a class of mine, not of transformers, so it may compute anything; "
    assert str(caught.value) == said + instead
    assert read_checkpoint(model(Derived).state_dict()).owner == "huggingface"

    def replace_part(module):
        module.vit.layernorm = Derived({"weight": torch.ones(96)})

    def replace_forward(module):
        module.vit.forward = torch.nn.Identity().forward

    def hooked(module, kind, owner="mine"):
        def hook(*arguments):
            return None

        hook.__module__ = owner
        getattr(module.vit.embeddings, kind)(hook)

    for change, said in (
        (replace_part, "FakeViT: vit.layernorm is a class of mine, not of transformers, so it may compute anything; "),
        (replace_forward, "FakeViT: vit has a forward of its own, which may compute anything; remove it, or "),
        (lambda module: hooked(module, "register_forward_hook"), "FakeViT: vit.embeddings has a forward hook, which "),
        (lambda module: hooked(module, "register_forward_pre_hook"), "FakeViT: vit.embeddings has a forward hook, "),
    ):
        changed = model()
        change(changed)
        with pytest.raises(dvit.InputError) as caught:
            read_checkpoint(changed)
        assert str(caught.value).startswith(said)
        assert str(caught.value).endswith(instead)
    usual = model()
    hooked(usual, "register_forward_hook", "transformers.utils.output_capturing")  # of a model that has run
    assert read_checkpoint(usual).owner == "huggingface"
    assert same(read_checkpoint(torch.compile(usual)), read_checkpoint(usual))
    plain = FakeViT(PLAIN)
    plain.pretrained_cfg = {}
    plain.forward = torch.nn.Identity().forward
    with pytest.raises(dvit.InputError, match="FakeViT: the module has a forward of its own, which may compute any"):
        read_checkpoint(plain)


def test_a_module_of_timm(monkeypatch):
    model = FakeViT(PLAIN)
    model.pretrained_cfg = {"architecture": "deit_tiny", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    stated = {"num_heads": (2, "the module")}
    monkeypatch.setattr("dvit_infer.models.modules.module_facts", lambda module: stated if module is model else {})
    found = read_checkpoint(model)
    assert found.state.keys() == PLAIN.keys()
    assert found.stated == stated
    assert found.beside["config.json"] == {"pretrained_cfg": model.pretrained_cfg}
    engine = dvit.convert(model, device="cpu")
    assert engine.config.mean == (0.5, 0.5, 0.5)
    assert [(n.how, n.value) for n in engine.notes if n.what == "num_heads"] == [("read", "2")]
    assert dvit.verify(engine, model, num_images=2).passed
    model.broken = torch.nn.Module()
    model.broken.state_dict = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):  # the module's own mistake, with its traceback
        read_checkpoint(model)


def test_an_engine_of_a_module_can_be_saved(tmp_path):
    engine = dvit.convert(FakeViT(PLAIN), assume={"num_heads": 2}, device="cpu")
    engine.save(tmp_path / "a.safetensors")
    assert dvit.load(tmp_path / "a.safetensors", device="cpu").config == engine.config
