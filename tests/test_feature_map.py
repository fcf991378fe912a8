"""The dense map of patch tokens: reference and engine against tokens recorded at every stage, filled in one by one."""

import re
import subprocess
import sys

import pytest
import torch
from any_vit import FEW, tiny
from commands import ROOT
from golden_cases import case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.images.synthetic import sample_images

ODD = (24, 40)  # pixels: 3 by 5 patches
METHODS = {"none": {}, "predictor": {}, "random": {}, "evit": {}, "tome": {"merge": (3, 2)}}
FILLS = ["last", "zeros"]


class Recording:
    """The stages of a reference's forward, and the tokens that each block and its MLP would begin with."""

    def __init__(self, progress, seen):
        self.progress, self.seen = progress, seen

    def __getattr__(self, name):
        return getattr(self.progress, name)

    def before(self, block, x):
        self.seen.append((x, self.progress.positions))
        return self.progress.before(block, x)

    def __call__(self, x, signal):
        self.seen.append((x, self.progress.positions))
        return self.progress(x, signal)


@torch.no_grad()
def filled(model, images, fill):
    """The map of a reference in plain PyTorch, position by position."""
    seen, begin, num_patches = [], model.begin, model.grid[0] * model.grid[1]
    model.begin = None if begin is None else lambda *given: Recording(begin(*given), seen)
    out = model.evaluate(images)
    model.begin = begin
    rows = torch.zeros(len(images), num_patches, model.body.embed_dim)
    everywhere = torch.arange(num_patches).expand(len(images), -1)
    for x, positions in seen if fill == "last" else ():
        for image, places in enumerate(everywhere if positions is None else positions):
            for token, place in zip(x[image, -len(places) :], places.tolist(), strict=True):
                if place < num_patches:  # not a fused one
                    rows[image, place] = token
    rows = model.last_tokens(rows) if fill == "last" else rows
    merges = bool(out.kept) and out.kept[-1].shape[1] == num_patches
    for image, places in enumerate(everywhere if out.positions is None else out.positions):
        for token, place in zip(out.tokens[image, -len(places) :], places.tolist(), strict=True):
            if place < num_patches:
                rows[image, out.kept[-1][image] == place if merges else place] = token
    return rows.transpose(1, 2).unflatten(2, model.grid)


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FEW)
def test_a_reference_returns_what_its_stages_saw(kind, method):
    model = tiny(kind, method, ODD, METHODS[method])
    reference, images = model.reference(), model.images(2)
    for fill in FILLS:
        found = reference.feature_map(images, fill)
        close(found, filled(reference, images, fill), 1e-6)
        assert found.requires_grad


@pytest.mark.parametrize("method", ["predictor", "evit", "tome"])
@pytest.mark.parametrize("case", ["tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"])
def test_an_engine_returns_the_references(case, method):
    given = options(case) | {"method": method}
    reference, images = dvit.load_reference(official_checkpoint(case), **given), case_images(case)
    engine = dvit.convert(official_checkpoint(case), device="cpu", **given)
    engine.micro_batch = 2  # so that it comes in parts
    for fill in FILLS:
        found = engine.feature_map(images, fill=fill)
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        close(found, filled(reference, images, fill))
    assert (found == 0).all(dim=1).any() == (method != "tome")
    assert engine.feature_map(images).ne(0).any(dim=1).all()


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_bfloat16_errs_as_plain_pytorch_does(backend):
    """With the control, whose choice does not depend on rounding."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = tiny("deit", "random", ODD, depth=3)
    images = model.images(8)
    engine, plain = model.engine(torch.bfloat16, backend), model.reference().bfloat16()
    for fill in FILLS:
        exact = filled(model.reference(), images, fill)
        ours, theirs = engine.feature_map(images, fill), plain.feature_map(images.bfloat16(), fill)
        assert ours.dtype == torch.float32
        assert 0 < (ours - exact).norm() < 2 * (theirs.float() - exact).norm()


def test_what_it_does_not_take_is_named():
    case = "tiny-deit-r0.7-s1"
    engine, images = dvit.convert(official_checkpoint(case), device="cpu", **options(case)), case_images(case)
    for fill in ("mean", None, 0, ["last"], torch.zeros(2)):
        with pytest.raises(dvit.InputError, match=r"fill: .* is not one of last, zeros"):
            engine.feature_map(images, fill=fill)
    with pytest.raises(ValueError, match="fill: 'mean' is not one of last, zeros"):
        dvit.load_reference(official_checkpoint(case), **options(case)).feature_map(images, "mean")
    with pytest.raises(ValueError, match="int32"):
        engine.feature_map(images.int())
    with pytest.raises(ValueError, match="shape"):
        engine.feature_map(sample_images(1, (224, 240)))


@pytest.mark.slow
def test_a_head_learns_from_the_maps_of_a_pruned_model():
    """The example, with few images: a head that marks nothing gets 0, one that marks everything 0.05."""
    pytest.importorskip("sklearn")
    command = [sys.executable, str(ROOT / "examples" / "segment.py"), "512", "8"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [float(value) for value in re.findall(r"IoU (\d\.\d+)", shown)]
    assert len(found) == 3
    assert min(found) > 0.2
