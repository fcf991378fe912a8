"""OpenVINO and ONNX Runtime give the references' answers for maps, windows and routes, with given positions too."""

import pytest
import torch
from hierarchical_cases import SMALL, answers, checkpoint, images, kept_of, options

import dvit_infer as dvit
from dvit_infer.backends.cpu import CpuRunner, Linear
from dvit_infer.backends.openvino import OpenVinoRunner

QUICK = ("tiny-swin-r0.7-b2", "tiny-cnn-r0.5-s2")
CASES = [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in SMALL]
CUT = [("timm-tiny-swin-tame", (184, 200)), ("tiny-cnn-r0.7-s1", (121, 180))]  # padded windows, odd maps


@pytest.mark.parametrize("case", CASES)
def test_openvino_agrees(case):
    engine = dvit.convert(checkpoint(case), device="cpu", **options(case))
    assert isinstance(engine.runner, OpenVinoRunner)
    golden, x = answers(case), images(case)
    logits, kept = engine(x, return_kept=True)
    assert (logits - golden["logits"]).abs().max() < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_of(golden), strict=True))
    if kept:
        assert (engine(x, kept=kept) - logits).abs().max() < 2e-5


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("case", QUICK)
def test_both_linears_of_cpus_agree(case, prepacked):
    engine = dvit.convert(checkpoint(case), device="cpu", backend="torch")
    runner = CpuRunner(engine.graph, Linear(torch.float32, prepacked))
    for _ in range(2):  # the second time in memory that is used again
        assert (runner.run(images(case)).x - answers(case)["logits"]).abs().max() < 2e-5


def test_openvino_compiles_for_a_repeated_number_of_images():
    case = QUICK[1]
    engine, x = dvit.convert(checkpoint(case), device="cpu", backend="openvino"), images(case)
    first = engine(x)
    for batch in (2, 2, 1, 1, 2):
        assert (engine(x[:batch]) - first[:batch]).abs().max() < 2e-5
    assert {form.images for form in engine.runner._models} == {None, 1}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize(("case", "size"), CUT)
def test_other_sizes_are_verified(case, size, backend):
    engine = dvit.convert(checkpoint(case), device="cpu", image_size=size, backend=backend)
    report = dvit.verify(engine, checkpoint(case), num_images=4)
    assert report.passed, report
    assert report.first_difference is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("case", "size"), [*CUT, ("tiny-swin-r0.7-s1", (224, 224))])
def test_onnx_files_are_verified(case, size, dtype, tmp_path):
    engine = dvit.convert(checkpoint(case), device="cpu", image_size=size, backend="torch")
    dvit.export_onnx(engine, tmp_path / "m.onnx", dtype=dtype, kept=True)
    report = dvit.verify(dvit.load_onnx(tmp_path / "m.onnx"), checkpoint(case), num_images=4)
    assert report.passed, report
    assert report.first_difference is None
