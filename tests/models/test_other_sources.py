"""Sources that are no checkpoint of PyTorch in a file: modules, NumPy archives, names on the Hub, folders of others."""

import contextlib
import io
import json
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import official_checkpoint
from owners_files import State, file_of, same
from safetensors.torch import save_file

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.npz_file import read_npz
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
    with pytest.raises(dvit.InputError, match=r"FakeViT: its state_dict\(\) fails \(ZeroDivisionError\)"):
        read_checkpoint(model)


def test_an_engine_of_a_module_can_be_saved(tmp_path):
    engine = dvit.convert(FakeViT(PLAIN), assume={"num_heads": 2}, device="cpu")
    engine.save(tmp_path / "a.safetensors")
    assert dvit.load(tmp_path / "a.safetensors", device="cpu").config == engine.config


def arrays(case: str = "npz-augreg-tiny") -> dict[str, np.ndarray]:
    return {key: w.numpy() for key, w in file_of(case).items()}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_file(write, tmp_path):
    for case in ("npz-augreg-tiny", "npz-bv-stacked-map"):
        write(tmp_path / "a.npz", **arrays(case))
        assert same(read_checkpoint(tmp_path / "a.npz"), read_checkpoint(file_of(case)))
    turned = {key: np.asfortranarray(array) for key, array in arrays().items()}
    write(tmp_path / "b.npz", **turned)
    assert same(read_checkpoint(tmp_path / "b.npz"), read_checkpoint(file_of("npz-augreg-tiny")))


def test_an_npz_file_with_the_bytes_of_bfloat16_and_an_optimiser(tmp_path):
    small = {key: w.bfloat16() for key, w in file_of("npz-augreg-tiny").items()}
    stored = {f"opt/target/{key}": w.view(torch.int16).numpy().view("V2") for key, w in small.items()}
    np.savez(tmp_path / "a.npz", **stored, **{"opt/state/step": np.array(3)})
    found = read_checkpoint(tmp_path / "a.npz")
    assert same(found, read_checkpoint(small))
    assert found.left_over == (("opt/state/*", "the optimiser's state"),)


def test_an_npz_file_that_is_damaged_or_of_something_else(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(3))
    with pytest.raises(
        dvit.InputError, match=r"a\.npz: is a NumPy archive .* of no vision transformer .first name 'a'"
    ):
        read_checkpoint(path)
    np.savez(path, **arrays(), x=np.array([{}], dtype=object))
    with pytest.raises(dvit.InputError, match="an array of objects, which would run code"):
        read_checkpoint(path)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    np.savez(path, **arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.npy", buffer.getvalue())
    with pytest.raises(dvit.InputError, match=r"damaged NumPy archive .an array of another size"):
        read_checkpoint(path)
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(dvit.InputError, match="damaged"):
        read_checkpoint(path)


def peak_of(path: Path) -> int:
    """The most memory that reading takes at a time, in arrays and Python's own, also if it is an error."""
    tracemalloc.start()
    try:
        with contextlib.suppress(dvit.InputError):
            read_npz(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_npz_file_that_unpacks_to_many_times_its_size_is_not_read(tmp_path):
    path, size = tmp_path / "a.npz", 64 << 20
    np.savez_compressed(path, **arrays() | {"head/bias": np.zeros(size // 4, np.float32)})
    assert path.stat().st_size < size / 20
    with pytest.raises(dvit.InputError) as caught:
        read_checkpoint(path)
    assert "MiB whose arrays would take 6" in str(caught.value)
    assert "over 20 times as much, as trained weights never do" in str(caught.value)
    assert peak_of(path) < 8 << 20


@pytest.mark.slow
def test_an_npz_file_is_read_once_and_only_for_names_that_are_known(tmp_path):
    path, size = tmp_path / "a.npz", 64 << 20
    big = np.random.default_rng(0).random((96, size // 4 // 96), np.float32)
    for write in (np.savez, np.savez_compressed):
        write(path, **arrays() | {"head/kernel": big})
        assert size * 0.9 < peak_of(path) < size * 1.2
        write(path, **arrays() | {"junk": big})
        with pytest.raises(dvit.InputError, match=r"a\.npz: unexpected key junk: the ViT of JAX's .* has no such name"):
            read_checkpoint(path)
        assert peak_of(path) < 8 << 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'descr': '<U5', 'fortran_order': False, 'shape': (1,)}", "an array of <U5"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -5)}", "an array of another size than its data"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': " + "-" * 9000 + "5}", ""),
        ("(" * 9000, ""),
        ("{'descr': 3, 'fortran_order': 'x'", ""),
    ],
)
def test_an_npz_file_with_a_header_that_is_none(text, said, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path, "a") as archive:
        content = text.encode() + b"\n"
        archive.writestr("b.npy", b"\x93NUMPY\x01\0" + len(content).to_bytes(2, "little") + content + bytes(20))
    with pytest.raises(dvit.InputError, match=rf"a\.npz: damaged NumPy archive \({said}"):
        read_checkpoint(path)


def test_an_npz_file_that_is_packed_in_another_way_or_whose_data_changed(tmp_path):
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_LZMA) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(dvit.InputError, match=r"b\.npz: damaged NumPy archive .packed in another way than NumPy does"):
        read_checkpoint(other)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(dvit.InputError, match=r"a\.npz: damaged NumPy archive .Bad CRC-32 for file"):
        read_checkpoint(path)


def folder(path: Path, state: State, config: object) -> Path:
    path.mkdir(exist_ok=True)
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("kind", "called", "said"),
    [
        ("whisper", "WhisperForConditionalGeneration", "a Whisper model (model_type 'whisper', WhisperForConditional"),
        ("bert", "BertForMaskedLM", "a Bert model (model_type 'bert', BertForMaskedLM)"),
        (
            "resnet",
            "ResNetForImageClassification",
            "a ResNet model (model_type 'resnet', ResNetForImageClassification)",
        ),
        ("clip_text_model", "CLIPTextModel", "a CLIPText model"),
        ("gpt2", None, "a gpt2 model (model_type 'gpt2')"),
        ("yolos", "YolosForObjectDetection", "a Yolos model"),
    ],
)
def test_a_folder_of_another_model_is_named_as_its_config_says(kind, called, said, tmp_path):
    config = {"model_type": kind, "architectures": [called] if called else None}
    other = {"encoder.layer.0.attention.self.query.weight": torch.ones(3, 3)}
    for state in (other, file_of("hf-vit-tiny")):
        path = folder(tmp_path / "m", state, config)
        for source in (path, path / "model.safetensors"):
            with pytest.raises(dvit.InputError) as caught:
                dvit.convert(source, device="cpu")
            assert str(caught.value).startswith(f"{source}: is {said}")
            assert str(caught.value).endswith("; vision transformers are read")


def test_a_file_of_timms_names_beside_another_models_config_is_read(tmp_path):
    path = folder(tmp_path / "m", PLAIN, {"model_type": "bert"})
    assert read_checkpoint(path / "model.safetensors").state.keys() == PLAIN.keys()
    notes = dvit.convert(path / "model.safetensors", assume={"num_heads": 2}, device="cpu").notes
    assert "describes a model of Hugging Face" in str([note.why for note in notes if note.what == "config.json"])
    wrapped = {f"timm_model.{key}": w for key, w in PLAIN.items()}
    path = folder(tmp_path / "m", wrapped, {"model_type": "timm_wrapper"})
    assert read_checkpoint(path).state.keys() == PLAIN.keys()


def test_a_folder_without_weights_and_code_in_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    with pytest.raises(dvit.InputError, match=r"is a folder without model\.safetensors or pytorch_model\.bin"):
        read_checkpoint(tmp_path)
    path = folder(tmp_path, file_of("hf-vit-tiny"), {**VIT, "auto_map": {"AutoModel": "modeling_x.X"}})
    (path / "modeling_x.py").write_text("raise SystemExit('run')")
    found = read_checkpoint(path)
    why = "code beside the weights is never run"
    assert found.left_over == (("modeling_x.py", why), ("auto_map of config.json", why))
    assert read_checkpoint(path / "model.safetensors").left_over == (("auto_map of config.json", why),)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A huggingface_hub whose cache and network are folders; `hub.calls` are what it was asked."""
    module = types.ModuleType("huggingface_hub")
    module.__spec__ = types.SimpleNamespace()
    module.cache, module.network, module.calls = {}, {}, []

    def snapshot_download(name, revision, allow_patterns, local_files_only):
        module.calls.append((name, revision, local_files_only))
        found = module.cache.get(name) or (None if local_files_only else module.network.get(name))
        if found is None:
            raise FileNotFoundError("no such model.\nsecond line")
        return str(found)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return module


def test_a_name_on_the_hub(hub, tmp_path):
    path = folder(tmp_path / "there", PLAIN, {})
    hub.cache["user/name"] = path
    assert read_checkpoint("hf-hub:user/name").state.keys() == PLAIN.keys()
    assert hub.calls == [("user/name", None, True)]
    engine = dvit.convert("hf-hub:user/name@v1", assume={"num_heads": 2}, device="cpu")
    assert hub.calls[-1] == ("user/name", "v1", True)
    assert dvit.verify(engine, "hf-hub:user/name@v1", num_images=2).passed
    hub.network["timm/deit"] = path
    assert read_checkpoint("timm/deit").state.keys() == PLAIN.keys()
    assert hub.calls[-1] == ("timm/deit", None, False)
    with pytest.raises(
        dvit.InputError, match=r"hf-hub:a/b: is neither in the cache .* \(FileNotFoundError: no such mo"
    ):
        read_checkpoint("hf-hub:a/b")
    (tmp_path / "empty").mkdir()
    hub.cache["a/b"] = tmp_path / "empty"
    with pytest.raises(dvit.InputError, match="it holds no weights of PyTorch"):
        read_checkpoint("hf-hub:a/b")
    (tmp_path / "timm").mkdir()
    folder(tmp_path / "timm" / "deit", PLAIN, {})
    count = len(hub.calls)
    assert read_checkpoint("timm/deit").state.keys() == PLAIN.keys()
    assert len(hub.calls) == count


@pytest.mark.parametrize(
    "name", ["hf-hub:", "hf-hub:a", "hf_hub:a/../b", "hf-hub:a/..", "hf-hub:a/b/c", "hf-hub:a/b@", "hf-hub:a b/c"]
)
def test_what_is_no_name_on_the_hub_is_told_its_form(name, hub):
    with pytest.raises(dvit.InputError) as caught:
        read_checkpoint(name)
    form = "hf-hub:user/name is expected, or hf-hub:user/name@revision"
    assert str(caught.value) == f"{name}: names no model on the Hugging Face Hub; {form}"
    assert hub.calls == []


def test_a_name_on_the_hub_without_its_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("hf-hub:user/name", "timm/vit_base"):
        with pytest.raises(
            dvit.InputError, match=f"{name}: names a model on the Hugging Face Hub; pip install hugging"
        ):
            read_checkpoint(name)
    with pytest.raises(dvit.InputError, match="No such file"):
        read_checkpoint("user/name")
