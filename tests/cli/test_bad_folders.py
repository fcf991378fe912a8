"""Folders in Hugging Face's layout that hold another model, or one that its config.json contradicts: one line each."""

import json
from pathlib import Path

import pytest
import torch
from commands import fails
from golden_vits import State, config_of, state_dict
from safetensors.torch import save_file

from dvit_infer.cli import common, convert
from dvit_infer.models.reading import ASSUMABLE

pytestmark = pytest.mark.usefixtures("_empty_folder")
CPU = ["--device", "cpu", "--no-verify"]
HEAD = ("classifier.weight", "classifier.bias")
VIT = "Hugging Face's ViT, DeiT or BEiT"
HEADS = "its heads are called classifier.*, cls_classifier.*, distillation_classifier.*"


def folder(case: str = "hf-vit-tiny", stated=None, weights: State | None = None, without=()) -> Path:
    """The case's folder, its config.json and its weights changed."""
    path = Path("model")
    path.mkdir()
    state = {key: w for key, w in state_dict(case).items() if key not in without}
    save_file(state | (weights or {}), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps((config_of(case) or {}) | (stated or {})))
    return path


def names(count: int) -> dict[str, str]:
    return {str(i): f"class {i}" for i in range(count)}


@pytest.mark.parametrize(
    ("kind", "called", "said"),
    [("bert", "BertForMaskedLM", "Bert"), ("resnet", "ResNetModel", "ResNet"),
     ("whisper", "WhisperForConditionalGeneration", "Whisper")],
)  # fmt: skip
def test_another_model(kind, called, said, capsys):
    path = folder(stated={"model_type": kind, "architectures": [called]})
    expected = f"error: model: is a {said} model (model_type '{kind}', {called}); vision transformers are read\n"
    assert fails(convert, [path, *CPU], capsys) == expected


@pytest.mark.parametrize(
    ("case", "stated", "said"),
    [
        ("hf-vit-tiny", {"hidden_size": 128}, "hidden_size says embed_dim 128, but its weights have 96"),
        ("hf-vit-tiny", {"num_hidden_layers": 5}, "num_hidden_layers says depth 5, but its weights have 4"),
        ("hf-vit-tiny", {"patch_size": 8}, "patch_size says patch_size 8, but its weights have 16"),
        ("hf-vit-tiny", {"intermediate_size": 384},
         "intermediate_size says mlp_dim 384, but its weights have 320"),
        ("hf-dinov2-tiny", {"mlp_ratio": 3}, "mlp_ratio says mlp_dim 288, but its weights have 384"),
        ("hf-dinov2-tiny", {"use_swiglu_ffn": True},
         "mlp_ratio says mlp_dim 256, but its weights have 384"),
        ("hf-vit-tiny", {"id2label": names(10)}, "id2label says num_classes 10, but its weights have 64"),
        ("hf-vit-tiny", {"id2label": {}}, "id2label says num_classes 0, but its weights have 64"),
        ("hf-vit-tiny", {"id2label": None, "num_labels": 0}, "num_labels says num_classes 0, but its weights have 64"),
        ("timm-eva02_tiny_patch14_224-d4-tame", {"architecture": "vit_small_patch16_224"},
         "architecture vit_small_patch16_224 says embed_dim 384, but its weights have 192"),
        ("timm-eva02_tiny_patch14_224-d4-tame", {"model_args": {"depth": 5}},
         "model_args.depth says depth 5, but its weights have 4"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_weights(case, stated, said, capsys):
    line = fails(convert, [folder(case, stated), *CPU], capsys)
    assert line == f"error: model/model.safetensors: config.json: {said}\n"


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', none of gelu, "),
        ({"pooler_act": "relu"}, "pooler_act is relu, which is not supported; dvit_infer does not read"),
        ({"auto_map": {"AutoModelForImageClassification": "modeling_mine.Mine"}},
         "auto_map names code that came with the weights, which is never run: what it computes is not known"),
    ],
)  # fmt: skip
def test_a_config_of_what_is_not_read(stated, said, capsys):
    path = folder(stated=stated)
    (path / "modeling_mine.py").write_text("raise SystemExit('it ran')")
    assert fails(convert, [path, *CPU], capsys).startswith(f"error: model/model.safetensors: {said}")


def test_an_unknown_architecture_of_timm(capsys):
    line = fails(convert, [folder(stated={"architecture": "eva02_tinny_patch14_224"}), *CPU], capsys)
    assert line.startswith("error: model/model.safetensors: architecture 'eva02_tinny_patch14_224' is none of the ")
    assert "the nearest of them: eva02_tiny_patch14_224, " in line


def test_a_config_that_is_no_json(capsys):
    path = folder()
    (path / "config.json").write_text('{"model_type": "vit"')
    line = fails(convert, [path, *CPU], capsys)
    said = "its config.json is no JSON; mend it, or remove it so that heads, eps and the like are assumed (config.json)"
    assert line == f"error: model/model.safetensors: {said}\n"
    assert fails(convert, [path, *CPU, "--assume", "num_heads=3"], capsys) == line  # eps would still be a guess
    (path / "config.json").unlink()
    assert convert.main([str(path), *CPU, "--assume", "num_heads=3", "--no-verify"]) == 0


@pytest.mark.parametrize(
    ("without", "weights", "said"),
    [
        ((), {"vit.encoder.layer.2.attention.attention.query.lora_A": torch.ones(4, 96)},
         f"unexpected key vit.encoder.layer.2.attention.attention.query.lora_A: {VIT} has no such name"),
        (HEAD, {"fc.weight": torch.ones(5, 96)}, f"unexpected key fc.weight: {VIT} has no such name; {HEADS}"),
        (HEAD, {"classifier.out_proj.weight": torch.ones(5, 96)},
         f"unexpected key classifier.out_proj.weight: {VIT} has no such name; {HEADS}"),
        (HEAD, {}, "has no classifier (no head.weight), but config.json: id2label says 64 classes"),
        (HEAD[1:], {}, "classifier.weight (head.weight here) has no bias beside it, but config.json: id2label says 64 "
         "classes"),
        ((), {"classifier.weight": torch.ones(64, 128)},
         "classifier.weight (head.weight here) has shape (64, 128), (64, 96) is expected, as head.bias has 64 rows"),
        (("vit.encoder.layer.2.layernorm_after.bias",), {},
         "missing key vit.encoder.layer.2.layernorm_after.bias (blocks.2.norm2.bias here), which vit-96x4 has"),
    ],
)  # fmt: skip
def test_keys_and_heads_that_do_not_fit(without, weights, said, capsys):
    line = fails(convert, [folder(weights=weights, without=without), *CPU], capsys)
    assert line == f"error: model/model.safetensors: {said}\n"


def test_a_folder_without_weights_and_shards_that_are_not_there(capsys):
    path = folder()
    (path / "model.safetensors").rename("elsewhere.safetensors")
    said = "is a folder without model.safetensors or pytorch_model.bin; a checkpoint is expected"
    assert fails(convert, [path, *CPU], capsys) == f"error: model: {said}\n"
    index, shard = path / "model.safetensors.index.json", "model-00002-of-00002.safetensors"
    save_file({"classifier.bias": torch.ones(64)}, path / "model-00001-of-00002.safetensors")
    table = {"classifier.bias": "model-00001-of-00002.safetensors", "classifier.weight": shard}
    index.write_text(json.dumps({"weight_map": table}))
    said = f"is missing: shard 2 of 2 that {index.name} names"
    assert fails(convert, [path, *CPU], capsys) == f"error: model/{shard}: {said}\n"
    index.write_text(json.dumps({"weight_map": {"classifier.bias": "../elsewhere.safetensors"}}))
    said = "names the shard '../elsewhere.safetensors'; a file in the index's own folder is expected"
    assert fails(convert, [path, *CPU], capsys) == f"error: {index}: {said}\n"


@pytest.mark.parametrize(
    ("case", "more", "said"),
    [
        ("hf-vit-tiny", ["--image-size", "100"], "--image-size: 100x100 is not a multiple of the patch size 16"),
        ("hf-dinov3-tiny", ["--image-size", "96x100"], "--image-size: 96x100 is not a multiple of the patch size 16"),
        ("hf-beit-tiny", ["--image-size", "128", "--assume", "resample=timm"],
         "--image-size: 128x128 needs other relative positions than model/model.safetensors holds, which only Hugging "
         "Face's rule resamples here; assume resample=huggingface takes it"),
        ("hf-vit-tiny", ["--assume", "num_heads=5"], "--assume num_heads: 5 does not divide the width 96"),
        ("hf-vit-tiny", ["--assume", "act=relu"],
         "--assume act: 'relu' is not one of gelu, gelu_tanh, quick_gelu, silu"),
        ("hf-vit-tiny", ["--assume", "resample=nearest"],
         "--assume resample: 'nearest' is not one of timm, huggingface, meta, big_vision, siglip2, torchvision"),
        ("hf-vit-tiny", ["--assume", "rope=polar"],
         "--assume rope: 'polar' is not one of none, dinov3, eva02, axial, mixed"),
        ("hf-vit-tiny", ["--method", "predictor"],
         "--method: 'predictor' needs score predictors, and model/model.safetensors holds none; 'evit', 'tome', "
         "'random' need none, 'none' runs it dense"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(case, more, said, capsys):
    assert fails(convert, [folder(case), *CPU, *more], capsys) == f"error: {said}\n"


def test_a_size_beside_the_weights_that_no_patches_fit(capsys):
    line = fails(convert, [folder("hf-dinov3-tiny", {"image_size": 100}), *CPU], capsys)
    assert line == "error: model/model.safetensors: image_size: 100x100 is not a multiple of the patch size 16\n"


def test_many_classes_another_size_and_code_are_no_errors(capsys):
    weights = {"classifier.weight": torch.randn(21000, 96) / 10, "classifier.bias": torch.zeros(21000)}
    stated = {"id2label": names(21000), "image_size": 128, "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    path = folder(stated=stated, weights=weights)
    (path / "configuration_mine.py").write_text("raise SystemExit('it ran')")
    assert convert.main([str(path), *CPU, "-o", "out.safetensors", "--json", "found.json"]) == 0
    config = json.loads(Path("found.json").read_text())["config"]
    assert (config["num_classes"], config["image_size"], config["trained_size"]) == (21000, [128, 128], [96, 96])
    assert "code beside the weights is never run" in capsys.readouterr().out


def test_no_labels_and_no_head_give_a_model_without_a_classifier(capsys):
    path = folder(stated={"id2label": {}, "label2id": {}, "num_labels": 0}, without=HEAD)
    assert convert.main([str(path), *CPU, "-o", "out.safetensors", "--json", "found.json"]) == 0
    assert json.loads(Path("found.json").read_text())["config"]["num_classes"] == 0


def test_what_may_be_assumed_is_called_as_the_user_writes_it():
    parser = common.Parser()
    for name in ASSUMABLE:
        assert common._as_options(f"{name}: x", parser).startswith("--assume ") or name in ("keep_rate", "prune_at")
