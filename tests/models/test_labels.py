"""Names of classes that travel with a model: from its file, through saved files and ONNX, to predictions."""

import argparse
import json

import pytest
import torch
from golden_cases import official_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dvit_infer as dvit

NAMES = [f"kind {i}" for i in range(10)]


def content(names):
    args = argparse.Namespace(num_heads=2, dvit_infer={"classes": names})
    return {"model": official_checkpoint("tiny-deit-r0.7-s1")["model"], "args": args}


def test_they_go_from_a_trained_file_through_a_saved_one_to_onnx(tmp_path):
    engine = dvit.convert(content(NAMES), device="cpu")
    assert engine.labels == dict(enumerate(NAMES))
    engine.save(tmp_path / "m.safetensors")
    assert dvit.load(tmp_path / "m.safetensors", device="cpu").labels == engine.labels
    dvit.export_onnx(engine, tmp_path / "m.onnx", labels=engine.labels)
    assert dvit.load_onnx(tmp_path / "m.onnx", device="cpu").labels == engine.labels


@pytest.mark.parametrize("names", [None, NAMES[:9], [1] * 10, "ten names", {"x": "y"}, {str(i): 3 for i in range(10)}])
def test_what_is_no_list_of_ten_names_is_not_taken(names):
    assert dvit.convert(content(names), device="cpu").labels is None


@pytest.mark.parametrize("key", ["id2label", "label_names"])
def test_a_config_beside_the_weights_names_them(key, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(official_checkpoint("tiny-deit-r0.7-s1")["model"], path)
    found = {str(i): name for i, name in enumerate(NAMES)} if key == "id2label" else NAMES
    (tmp_path / "config.json").write_text(json.dumps({key: found}))
    assert dvit.convert(path, device="cpu", assume={"num_heads": 2}).labels == dict(enumerate(NAMES))


def test_damaged_ones_of_a_saved_engine_are_named(tmp_path):
    path = tmp_path / "m.safetensors"
    dvit.convert(content(NAMES), device="cpu").save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["dvit_infer"])
    for labels in ({"10": "x"}, {"x": "y"}, 3, {"1": 3}):
        save_file(load_file(path), tmp_path / "n.safetensors", {"dvit_infer": json.dumps(header | {"labels": labels})})
        with pytest.raises(dvit.InputError, match=r"n\.safetensors: its labels are not"):
            dvit.load(tmp_path / "n.safetensors", device="cpu")
    assert torch.equal(load_file(path)["head.bias"], content(NAMES)["model"]["head.bias"])
