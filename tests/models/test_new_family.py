"""A made-up family and a second reduction: what a stranger adds is a folder or a file, and everything works with it."""

import pytest
import torch
from mean_vit import FAMILY
from mean_vit.read import MeanViT

import dvit_infer as dvit
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.config import Config
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models import registry
from dvit_infer.models.fill import fill
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.ops.choices import Choices, using


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, FAMILY))


@pytest.fixture(scope="module")
def state():
    config = Config("mean-vit", "meanvit", 7, (48, 48), (48, 48), MeanViT(8, 32, 3, 2, 64))
    shapes = {name: tuple(w.shape) for name, w in FAMILY.reference(config).state_dict().items()}
    return {name: torch.from_numpy(fill(name, shape, 0)) for name, shape in shapes.items()}


POOLED = {"score": "pooled"}  # it has no class token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "given"),
    [(None, {}), ("random", {}), ("evit", {"assume": POOLED}), ("tome", {}), ("tome", {"merge": [5, 0, 9]})],
)
def test_it_converts_verifies_and_is_saved(state, method, given, dtype, tmp_path):
    engine = dvit.convert(
        state, device="cpu", method=method, dtype=dtype, image_size=(40, 64), backend="torch", **given
    )
    report = dvit.verify(engine, state, num_images=8)
    assert report.passed, report
    assert report.first_difference is None
    engine.save(tmp_path / "m.safetensors")
    again = dvit.load(tmp_path / "m.safetensors", device="cpu", dtype=dtype, backend="torch")
    assert again.config == engine.config
    images = sample_images(3, (40, 64))
    assert torch.equal(again(images), engine(images))
    assert preprocess_for(engine.config).crop_pct == 1.0


def test_a_head_that_reads_the_mean_is_never_cut_to_a_class_row(state):
    engine = dvit.convert(state, device="cpu", method="random")
    attention, mlp, head = engine.graph.nodes[-3:]
    assert attention.rows == mlp.tokens == head.tokens == engine.config.num_keep[-1] > 1
    images = sample_images(2, (48, 48))
    tokens, positions = engine.tokens(images)
    assert torch.equal(positions, engine(images, return_kept=True)[1][-1])
    torch.testing.assert_close(engine.features(images), tokens.mean(dim=1))


def test_evit_and_tome_choose_as_in_the_reference(state):
    with pytest.raises(dvit.InputError, match="the model has none; assume score=pooled"):
        dvit.convert(state, device="cpu", method="evit")
    images = sample_images(3, (48, 48))
    for given in ({"method": "evit", "assume": POOLED, "prune_at": (0, 2)}, {"method": "tome", "merge": 7}):
        engine = dvit.convert(state, device="cpu", backend="torch", **given)
        with torch.no_grad():
            expected, stages = dvit.load_reference(state, **given)(images, return_kept=True)
        logits, kept = engine(images, return_kept=True)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        assert all(map(torch.equal, kept, stages))
        torch.testing.assert_close(engine(images, kept=kept), expected, atol=2e-5, rtol=0)


def test_kept_sets_can_be_given(state):
    engine = dvit.convert(state, device="cpu", method="random", prune_at=(0, 2), keep_rate=0.5)
    reference = dvit.load_reference(state, method="random", prune_at=(0, 2), keep_rate=0.5)
    kept = [torch.tensor([[*range(18)]]), torch.tensor([[*range(0, 18, 2)]])]
    with torch.no_grad():
        expected = reference(sample_images(1, (48, 48)), kept=kept)
    torch.testing.assert_close(engine(sample_images(1, (48, 48)), kept=kept), expected, atol=2e-5, rtol=0)


@pytest.mark.interpreter
@pytest.mark.slow
def test_the_kernels_run_it(state):
    engine = dvit.convert(state, device="cpu", method="random")
    images = sample_images(2, (48, 48))
    with using(Choices(otherwise="triton")):
        logits = TritonRunner(engine.graph).run(images).x
    torch.testing.assert_close(logits, engine(images), atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", [None, "random"])
def test_an_onnx_file_of_it(method, state, tmp_path):
    engine = dvit.convert(state, device="cpu", method=method)
    dvit.export_onnx(engine, tmp_path / "m.onnx")
    images = sample_images(2, (48, 48))
    torch.testing.assert_close(
        dvit.load_onnx(tmp_path / "m.onnx", device="cpu")(images), engine(images), atol=2e-5, rtol=0
    )
