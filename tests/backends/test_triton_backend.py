"""The Triton backend: whole golden models through the kernels, in Triton's interpreter where there is no GPU."""

import copy
import pickle

import pytest
import torch
from golden_cases import answers, case_images, official_checkpoint, options, same_kept
from kernel_helpers import needs_loops

import dvit_infer as dvit
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.models.registry import build_graph
from dvit_infer.ops.choices import Choices, using

pytestmark = [pytest.mark.interpreter, needs_loops]
TRITON, PYTORCH = Choices(otherwise="triton"), Choices(otherwise="pytorch")
TINY, TINY_LVVIT = "tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"  # the latter of smaller images


def converted(case_id, dtype="float32", **more):
    """An engine on the CPU with the Triton backend."""
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", dtype=dtype, **options(case_id) | more)
    with using(TRITON):
        engine.runner = TritonRunner(engine.graph)
    return engine


@pytest.mark.parametrize(
    ("case_id", "choices"),
    [
        pytest.param(TINY, TRITON, marks=pytest.mark.slow),
        (TINY_LVVIT, TRITON),
        pytest.param("tiny-deit-r0.7-s41-tame", PYTORCH, marks=pytest.mark.slow),
    ],
    ids=["deit-kernels", "lvvit-kernels", "deit-pytorch"],
)
def test_agrees_with_the_golden_case(case_id, choices):
    engine, (expected, expected_kept, margin) = converted(case_id), answers(case_id)
    count = 1 if choices is TRITON else len(expected)  # the interpreter is slow
    with using(choices):
        logits, kept = engine(case_images(case_id)[:count], return_kept=True)
    assert logits.dtype == torch.float32
    assert (logits - expected[:count]).abs().max() < 2e-5
    assert same_kept(kept, [stage[:count] for stage in expected_kept], margin[:count])


@pytest.mark.slow
@pytest.mark.parametrize("case_id", [pytest.param(TINY, marks=pytest.mark.large), TINY_LVVIT])
def test_float16_strays_no_further_than_plain_pytorch(case_id):
    checkpoint, images = official_checkpoint(case_id), case_images(case_id)[:1]
    reference = dvit.load_reference(checkpoint, **options(case_id))
    expected, kept = reference(images, return_kept=True)
    plain = reference.half()(images.half(), kept=kept).float()
    with using(TRITON):
        logits = converted(case_id, "float16")(images, kept=kept)
    assert (logits - expected).square().mean().sqrt() <= 2 * (plain - expected).square().mean().sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("case_id", [pytest.param(TINY, marks=pytest.mark.large), TINY_LVVIT])
def test_uint8_is_normalised_inside(case_id):
    engine = converted(case_id)
    raw = (case_images(case_id)[:1] * 60 + 120).clamp(0, 255).to(torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (engine.config.mean, engine.config.std))
    with using(PYTORCH):  # the patch embedding is a kernel in any case
        assert torch.allclose(engine(raw), engine((raw / 255 - mean) / std), atol=1e-5)
        nhwc = raw.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert torch.equal(engine(nhwc), engine(raw))


@pytest.mark.slow
def test_every_nodes_output_can_be_hooked():
    """And equals that of the PyTorch backend: statistics that travel with the rows belong to these rows."""
    engine = converted(TINY)
    plain = dvit.convert(official_checkpoint(TINY), device="cpu", **options(TINY))
    seen, expected = {}, {}
    with using(PYTORCH):
        found = plain.runner.run(case_images(TINY), None, lambda node, x: expected.update({node.name: x.clone()}))
        engine.runner.run(case_images(TINY), found.choices, lambda node, x: seen.update({node.name: x.clone()}))
    assert seen.keys() == expected.keys()
    for name, out in expected.items():
        torch.testing.assert_close(seen[name], out, atol=2e-5, rtol=1e-4)


@pytest.mark.large
def test_distillation_token_and_dense():
    checkpoint = official_checkpoint("timm-deit_small_distilled_patch16_224")
    engine = dvit.convert(checkpoint, device="cpu")
    images = case_images("timm-deit_small_distilled_patch16_224")[:1]
    with using(PYTORCH):
        logits = TritonRunner(engine.graph).run(images).x
    assert (logits - engine(images)).abs().max() < 2e-5


def test_an_unfolded_graph_is_refused():
    reference = dvit.load_reference(official_checkpoint(TINY), **options(TINY))
    config = dvit.convert(official_checkpoint(TINY), device="cpu", **options(TINY)).config
    with using(TRITON), pytest.raises(ValueError, match=r"blocks\.0\.attn is not folded"):
        TritonRunner(build_graph(reference, config))


@pytest.mark.slow
def test_a_runner_can_be_copied_and_pickled():
    with using(PYTORCH):
        runner = converted(TINY_LVVIT).runner
        images = case_images(TINY_LVVIT)[:1]
        expected = runner.run(images).x
        for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
            assert torch.equal(other.run(images).x, expected)
    assert runner.buffer_bytes > 0
