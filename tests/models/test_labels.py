"""Names of classes that travel with a model: from its file, through saved files and ONNX, to predictions."""

import argparse
import json

import pytest
import torch
from golden_cases import official_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.labels import checked_labels, labels_of

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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"id2label": {str(i): f"LABEL_{i}" for i in range(10)}}, None),
        ({"id2label": {str(i): f"LABEL_{i}" for i in range(10)}, "label_names": NAMES}, NAMES),
        ({"id2label": {str(i): f"LABEL_{9 - i}" for i in range(10)}}, [f"LABEL_{9 - i}" for i in range(10)]),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"pretrained_cfg": {"label_names": NAMES}}, NAMES),
        (
            {"label_names": NAMES, "label_descriptions": {"kind 3": "three", "kind 4": 4}},
            [*NAMES[:3], "three", *NAMES[4:]],
        ),
        ({"label_names": {str(i): name for i, name in enumerate(NAMES)}, "label_descriptions": {}}, NAMES),
        ({"label_names": [[]] * 10, "label_descriptions": {"kind 3": "three"}}, None),
        ({"label_names": 3, "label_descriptions": [1], "id2label": []}, None),
        ({"id2label": None, "pretrained_cfg": 3}, None),
    ],
)
def test_what_a_config_says_of_classes(config, expected, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(official_checkpoint("tiny-deit-r0.7-s1")["model"], path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = dvit.convert(path, device="cpu", assume={"num_heads": 2}).labels
    assert found == (None if expected is None else dict(enumerate(expected)))


@pytest.mark.parametrize("classes", [21_841, 21_843])
def test_many_classes_have_their_names(classes, tmp_path):
    names = [f"a class with a name as long as these are, {i}" for i in range(classes)]
    (tmp_path / "config.json").write_text(
        json.dumps({"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}})
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    assert labels_of(checkpoint, classes) == dict(enumerate(names))
    assert labels_of(checkpoint, classes - 1) is None


def test_a_model_without_classifier_has_none(tmp_path):
    assert checked_labels("f", None, 0) is None
    assert checked_labels("f", {}, 0) is None
    with pytest.raises(dvit.InputError, match="f: its labels are not"):
        checked_labels("f", {"0": "x"}, 0)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label_names": []}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert labels_of(read_checkpoint(tmp_path / "model.safetensors"), 0) is None


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
