"""int8 as a dtype of engines: static and dynamic, saved ranges, verification, what cannot be calibrated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from any_vit import KINDS, tiny
from commands import fails
from drawn import draw_all
from golden_cases import case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends.ranges import _RangeRunner, activation_ranges
from dvit_infer.cli import bench, convert
from dvit_infer.graph import fold
from dvit_infer.graph.nodes import Attention, Mlp
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.source import WeightSource
from dvit_infer.operators.openvino import OpenVinoBuilder, _grid
from dvit_infer.parity.verification import _standard_error

pytest.importorskip("openvino")
CASE = "tiny-deit-r0.7-s1"
DIGITS = str(Path(__file__).parents[2] / "dvit_infer" / "digits-0.7.pth")


def converted(**more):
    placed = {"device": "cpu", "dtype": "int8"} | more
    return dvit.convert(official_checkpoint(CASE), **options(CASE) | placed)


def test_it_is_int8_and_close(tmp_path):
    """Static and dynamic; logits are float32; what the engine says of itself."""
    images = case_images(CASE)
    exact = dvit.convert(official_checkpoint(CASE), device="cpu", **options(CASE))
    for engine, said in ((converted(calibrate=images), "int8 (static"), (converted(), "int8 (dynamic")):
        assert (engine.precision, engine.dtype) == ("int8", torch.float32)
        assert f"{said}; scores float32, the rest " in str(engine.graph)
        logits, kept = engine(images, return_kept=True)
        assert logits.dtype == torch.float32
        error = (engine(images, kept=kept) - exact(images, kept=kept)).square().mean().sqrt()
        assert 0 < error < 0.05 * logits.square().mean().sqrt()
        assert not torch.equal(logits, exact(images))
        assert engine.features(images).shape == (len(images), 64)


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind(kind):
    """All linears of attention and MLPs have ranges, and int8 changes a little."""
    model = tiny(kind)
    images = model.images(4)
    graph = fold(model.graph())
    ranges = activation_ranges(graph, [images])
    nodes = {node.name for node in graph.nodes if isinstance(node, Attention | Mlp)}
    assert {name.split("/")[0] for name, *_ in ranges} == nodes
    assert all(low <= 0 < high for _, low, high in ranges)


def test_no_channel_is_stepped_over():
    """One channel of many far out; batches and tokens such that even steps would never see it."""
    runner = _RangeRunner(fold(tiny("deit").graph()))
    runner._node = "blocks.0.attn"
    for channels, tokens in ((384, 138), (384, 97), (384, 68), (1536, 97), (768, 197)):
        x = torch.randn(16, tokens, channels)
        x[..., 1] += 20
        runner.found.clear()
        runner._see("proj", x)
        ((low, high),) = runner.found["blocks.0.attn/proj"]
        assert low < -3 < 20 < high


def test_weights_that_are_off_are_found(monkeypatch):
    """Three percent in each scale; half a step is allowed."""
    build = OpenVinoBuilder._quantised_weight
    monkeypatch.setattr(OpenVinoBuilder, "_quantised_weight", lambda to, name, w: build(to, name, w * 1.03))
    report = dvit.verify(converted(), official_checkpoint(CASE), num_images=4)
    assert report.wrong_weight is not None


def test_ranges_are_saved_with_the_model(tmp_path):
    images = case_images(CASE)
    engine = converted(calibrate=images)
    engine.save(tmp_path / "m.safetensors")
    loaded = dvit.load(tmp_path / "m.safetensors", device="cpu", dtype="int8")
    assert loaded.config.ranges == engine.config.ranges
    assert torch.equal(loaded(images), engine(images))
    assert dvit.load(tmp_path / "m.safetensors", device="cpu").precision == "float32"
    assert "static" in str(dvit.load(tmp_path / "m.safetensors", device="cpu", dtype="int8", keep_rate=0.5).graph)


@pytest.mark.parametrize("ranges", [[["a", 1.0, 2.0]], [["a", -1.0]], [["a", -1.0, float("nan")]], "a", [[1, -1, 1]]])
def test_ranges_in_a_damaged_header(ranges, tmp_path):
    from safetensors.torch import load_file, save_file

    from dvit_infer.models.header import HEADER_KEY, header_text

    engine = converted()
    engine.save(tmp_path / "m.safetensors")
    header = json.loads(header_text(engine.config))
    header["config"]["ranges"] = ranges
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "m.safetensors", {HEADER_KEY: json.dumps(header)})
    with pytest.raises(dvit.InputError, match="ranges: they are not a list of names"):
        dvit.load(tmp_path / "m.safetensors", device="cpu")


def test_steps_hold_the_range_and_zero():
    for low, high in ((-1.0, 1.0), (-0.17, 5.0), (0.0, 3.0), (-4.0, 1.0), (-0.3, 1.0), (0.0, 1e-6)):
        first, last = _grid(low, high)
        step = (last - first) / 255
        assert first <= low + step
        assert last >= high - step
        assert abs(first / step - round(first / step)) < 1e-4


def test_it_is_verified():
    """By top-1 agreement; ranges far too small fail."""
    checkpoint, images = official_checkpoint(CASE), case_images(CASE)
    report = dvit.verify(converted(calibrate=images), checkpoint, images=images)
    assert (report.dtype, report.num_images) == ("int8", len(images))
    assert report.passed, report
    assert report.wrong_weight is None
    assert "half a step" in str(report)
    calibrated = converted(calibrate=images)
    small = tuple((name, low / 50, high / 50) for name, low, high in calibrated.config.ranges)
    read = read_checkpoint(checkpoint)
    source = WeightSource(checkpoint, read)
    config = replace(calibrated.config, ranges=small)
    spoiled = dvit.Engine(config, read, [], torch.device("cpu"), torch.float32, source, None, True)
    report = dvit.verify(spoiled, checkpoint)
    assert not report.passed
    assert any("top-1" in failure or "rms" in failure for failure in report.failures)


def test_one_flip_of_few_images_is_chance():
    assert 62 / 64 + 2 * _standard_error(62 / 64, 1.0, 64) > 0.98
    assert 0.95 + 2 * _standard_error(0.95, 1.0, 10_000) < 0.98


def test_what_cannot_be_calibrated(tmp_path):
    (tmp_path / "empty").mkdir()
    for given, said in {
        tmp_path / "empty": "calibrate: .*no image",
        tmp_path / "none": "calibrate: .*none",
        3: "calibrate: images or a folder are expected, not a int",
    }.items():
        with pytest.raises(dvit.InputError, match=said):
            converted(calibrate=given)
    with pytest.raises(dvit.InputError, match=r"calibrate: images: shape \(1, 3, 32, 32\)"):
        converted(calibrate=torch.zeros(1, 3, 32, 32))
    with pytest.raises(dvit.InputError, match="calibrate: is for dtype int8"):
        converted(calibrate=case_images(CASE), dtype="float32")
    with pytest.raises(dvit.InputError, match="calibrate: the model gives NaN or Inf for these images"):
        converted(calibrate=torch.full((1, 3, 224, 224), float("nan")))


@pytest.mark.slow
def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_all(Path("images"), 8)
    assert convert.main([DIGITS, "--dtype", "int8", "--calibrate", "images", "-o", "m.safetensors"]) == 0
    assert "parity passed" in capsys.readouterr().out
    argv = ["m.safetensors", "--dtype", "int8", "--batch", "4", "--seconds", "0.1", "--json", "r.json"]
    assert bench.main([*argv, "--compare", "reference"]) == 0
    assert "int8 (static" in capsys.readouterr().out
    rows = {row["runtime"]: row for row in json.loads(Path("r.json").read_text())["rows"]}
    assert {name: row["dtype"] for name, row in rows.items()} == {"reference": "float32", "engine": "int8"}
    assert rows["engine"]["variant"] == "openvino"
    assert rows["engine"]["top1_agreement"] is not None
    Path("empty").mkdir()
    line = fails(convert, [DIGITS, "--dtype", "int8", "--calibrate", "empty", "-o", "n.safetensors"], capsys)
    assert line.startswith("error: --calibrate: empty")
    line = fails(convert, [DIGITS, "--calibrate", "images", "-o", "n.safetensors"], capsys)
    assert line.startswith("error: --calibrate: is for dtype int8")
    line = fails(convert, [DIGITS, "--dtype", "int8", "--format", "onnx"], capsys)
    assert line.startswith("error: --dtype: an ONNX file is made int8 by --quantize int8")
    assert not Path("n.safetensors").exists()
