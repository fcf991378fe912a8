"""Names on the Hugging Face Hub, and folders of other models, as sources."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from golden_cases import official_checkpoint
from owners_files import State, file_of
from safetensors.torch import save_file

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint

VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
PLAIN: State = {k: w for k, w in official_checkpoint("tiny-deit-r0.7-s1")["model"].items() if "predictor" not in k}


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
