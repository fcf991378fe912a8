"""Saved files of other owners' vision transformers, and their sources in other forms, give the same model."""

import json
from pathlib import Path

import pytest
import torch
from golden_vits import (
    CASES,
    State,
    answers,
    arrays,
    assumptions,
    case_images,
    config_of,
    options,
    size_of,
    state_dict,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint

# One of each kind of file, and whose it is; the others differ from them in what a reference is held to elsewhere.
SAVED = {
    "hf-vit-tiny-at-64x128": "huggingface",
    "hf-deit-tiny-teacher": "huggingface",
    "hf-dinov2-swiglu-tiny": "huggingface",
    "hf-dinov3-gated-tiny": "huggingface",
    "hf-clip-full-tiny": "huggingface",
    "hf-beit-tiny-at-64x112": "huggingface",
    "timm-eva02_tiny_patch14_224-d4-tame": "timm",
    "npz-siglip-stacked-map": "big_vision",
    "openclip-tiny-quickgelu": "open_clip",
    "dinov2-hub-tiny-at-56x112": "meta",
    "dinov3-hub-swiglu-tiny-at-64x128": "meta",
}
MORE = {
    "hf-vitmodel-tiny": "huggingface",
    "hf-dinov2-tiny": "huggingface",
    "hf-dinov2reg-tiny-at-56x112": "huggingface",
    "hf-clip-cls-tiny": "huggingface",
    "hf-siglip-cls-tiny": "huggingface",
    "hf-siglip2-naflex-tiny": "huggingface",
    "npz-augreg-tiny": "big_vision",
}
# Beginnings of every name in timm's VisionTransformer and Eva.
TIMMS = ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj.", "norm_pre.", "blocks.", "norm.")
TIMMS += ("fc_norm.", "attn_pool.", "pre_logits.fc.", "head.", "head_dist.", "rope.")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.large if case in MORE else () if at % 4 == 0 else pytest.mark.slow)
        for at, case in enumerate({**SAVED, **MORE})
    ],
)
def test_a_saved_file_is_the_same_model_under_timms_names(case, tmp_path):
    source, images, path = write(case, tmp_path / "m"), case_images(case), tmp_path / "a.safetensors"
    engine = dvit.convert(source, device="cpu", **options(case))
    engine.save(path)
    with safe_open(path, "pt") as file:
        header, names = json.loads(file.metadata()["dvit_infer"]), list(file.keys())
    assert header["config"]["body"]["owner"] == (SAVED | MORE)[case]
    assert all(name.startswith(TIMMS) for name in names)
    assert names == sorted(dvit.load_reference(source, **options(case)).state_dict())
    loaded = dvit.load(path, device="cpu")
    assert loaded.config == engine.config
    assert loaded.labels == engine.labels
    assert torch.equal(loaded(images), engine(images))
    assert torch.equal(loaded.features(images), engine.features(images))
    assert dvit.verify(loaded, path, num_images=2).passed
    assert dvit.verify(loaded, source, num_images=2).passed
    with torch.no_grad():
        assert (dvit.load_reference(path)(images) - answers(case)[0]).abs().max() < 2e-5
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_a_saved_file_runs_at_another_size_by_its_owners_rule(tmp_path):
    for case, other in {"hf-vit-tiny": "hf-vit-tiny-at-160", "hf-dinov3-tiny": "hf-dinov3-tiny-at-64x128"}.items():
        engine = dvit.convert(write(case, tmp_path / case), device="cpu")
        engine.save(tmp_path / "a.safetensors")
        again = dvit.load(tmp_path / "a.safetensors", device="cpu", image_size=size_of(other))
        assert (again(case_images(other)) - answers(other)[0]).abs().max() < 1e-4


def in_dtype(state: State, dtype: torch.dtype) -> State:
    return {key: w.to(dtype) if w.is_floating_point() else w for key, w in state.items()}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("hf-dinov2-swiglu-tiny", torch.bfloat16), ("hf-siglip-tiny", torch.float16), ("dinov3-hub-tiny", torch.float16)],
)
def test_the_dtype_of_the_source_is_kept(case, dtype, tmp_path):
    small = in_dtype(state_dict(case), dtype)
    source = write(case, tmp_path / "m")
    if source.is_dir():
        save_file(small, source / "model.safetensors")
    else:
        torch.save(small, source)
    engine = dvit.convert(source, device="cpu", **options(case))
    engine.save(tmp_path / "a.safetensors")
    assert {w.dtype for w in load_file(tmp_path / "a.safetensors").values()} == {dtype}
    loaded = dvit.load(tmp_path / "a.safetensors", device="cpu")
    assert torch.equal(loaded(case_images(case)), engine(case_images(case)))
    assert dvit.verify(loaded, source, num_images=2).passed
    assert dvit.verify(engine, tmp_path / "a.safetensors", num_images=2).passed


class Stated:
    """A config as transformers' modules have it."""

    def __init__(self, content: dict) -> None:
        self.content = content

    def to_dict(self) -> dict:
        return self.content


def module_of(case: str, called: str) -> torch.nn.Module:
    """A module with the names of transformers' own, its weights and its config."""
    model: torch.nn.Module = type(called, (torch.nn.Module,), {})()
    for key, tensor in state_dict(case).items():
        *path, leaf = key.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        if tensor.is_floating_point():
            module.register_parameter(leaf, torch.nn.Parameter(tensor.clone()))
        else:
            module.register_buffer(leaf, tensor.clone())
    model.config = Stated(config_of(case))
    return model


@pytest.mark.parametrize("case", ["hf-vit-tiny", "hf-dinov2reg-tiny", "hf-clip-cls-tiny", "hf-siglip-tiny"])
def test_a_folder_its_files_its_state_dict_and_its_module_are_one_model(case, tmp_path):
    folder, images, row = write(case, tmp_path / "m"), case_images(case), CASES[case]
    engine = dvit.convert(folder, device="cpu")
    module = module_of(case, row["model"])
    for source in (folder / "model.safetensors", str(folder), module, module_of(case, "MyClassifier")):
        other = dvit.convert(source, device="cpu")
        assert other.config == engine.config
        assert torch.equal(other(images), engine(images))
    acts = {"gelu_pytorch_tanh": "gelu_tanh"}
    known = {"num_heads": row["num_heads"], "eps": row["eps"], "act": acts.get(row["act"], row["act"])}
    bare = dvit.convert(state_dict(case), device="cpu", assume=known)
    assert torch.equal(bare(images), engine(images))
    assert all(w.requires_grad for w in module.parameters())  # it is not changed


def test_shards_and_a_pickle_in_a_folder_are_the_model(tmp_path):
    case = "hf-dinov3-tiny"
    folder, state = write(case, tmp_path / "m"), state_dict(case)
    engine = dvit.convert(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    keys, table = sorted(state), {}
    for i, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"model-0000{i}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / name)
        table |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert torch.equal(dvit.convert(folder, device="cpu")(case_images(case)), engine(case_images(case)))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(dvit.convert(folder, device="cpu")(case_images(case)), engine(case_images(case)))


def test_an_npz_as_a_state_dict_is_the_model(tmp_path):
    case = "npz-bv-stacked-map"
    state = {key: torch.from_numpy(array) for key, array in arrays(case).items()}
    engine = dvit.convert(write(case, tmp_path), device="cpu")
    assert torch.equal(dvit.convert(state, device="cpu")(case_images(case)), engine(case_images(case)))


def test_the_assumptions_of_a_bare_file_are_saved_with_it(tmp_path):
    case = "openclip-tiny-quickgelu"
    path: Path = write(case, tmp_path)
    dvit.convert(path, device="cpu", assume=assumptions(case)).save(tmp_path / "a.safetensors")
    loaded = dvit.load(tmp_path / "a.safetensors", device="cpu")
    assert (loaded.config.body.act, loaded.config.num_heads) == ("quick_gelu", 3)
    assert read_checkpoint(tmp_path / "a.safetensors").is_saved_engine


def test_rotary_positions_are_said_in_short(tmp_path):
    engine = dvit.convert(write("hf-dinov3-tiny", tmp_path / "m"), device="cpu")
    assert [n.value for n in engine.notes if n.what == "rope"] == ["kind=centered theta=100 half=True"]
