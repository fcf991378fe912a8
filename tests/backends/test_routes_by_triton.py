"""DynamicSwin and DynamicConvNeXt by the Triton backend: the answers of reference and golden cases, their launches."""

import pytest
import torch
from hierarchical_cases import answers, checkpoint, images, kept_of, small_checkpoint
from kernel_helpers import needs_loops
from launched import launched

import dvit_infer as dvit
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.images.synthetic import sample_images
from dvit_infer.ops.choices import Choices, using

pytestmark = [pytest.mark.interpreter, needs_loops]
TRITON, PYTORCH = Choices(otherwise="triton"), Choices(otherwise="pytorch")
SWIN, CNN = "tiny-swin-r0.7-b2", "tiny-cnn-r0.5-s2"
SMALL = {"image_size": 64, "assume": {"trained_size": 64}}
ROUTED = ["_routed_fc1_kernel", "_routed_add_kernel"]


def runner_of(weights, dtype="float32", **options):
    engine = dvit.convert(weights, device="cpu", dtype=dtype, backend="torch", **options)
    with using(TRITON):
        return TritonRunner(engine.graph)


@pytest.mark.large
@pytest.mark.parametrize("case", [SWIN, CNN])
def test_agrees_with_the_golden_case(case):
    """Windows of 49 positions in heads of 32 channels, cut and whole."""
    golden = answers(case)
    with using(TRITON):
        found = runner_of(checkpoint(case)).run(images(case)[:1])  # the interpreter is slow
    assert (found.x - golden["logits"][:1]).abs().max() < 2e-5
    assert all(torch.equal(a, b[:1]) for a, b in zip(found.choices, kept_of(golden), strict=True))


@pytest.mark.parametrize(("case", "dim"), [(SWIN, 128), (CNN, 64)])
def test_agrees_with_the_reference_around_the_kernels_that_route(case, dim):
    """By its own choice, and by a given one; PyTorch stands in for linears and attention."""
    sizes = {"dtype": "float32", "size": 32, "dim": dim, "hidden": 4 * dim}
    routing = Choices(({"op": "routed_mlp", "by": "triton"} | sizes,), otherwise="pytorch")
    weights, x = small_checkpoint(case), sample_images(1, (64, 64))
    runner, reference = runner_of(weights, **SMALL), dvit.load_reference(weights, **SMALL)
    given = [torch.arange(count)[None] for count in runner.config.num_keep]
    with torch.no_grad():
        for choices, kept in ((routing, None), (PYTORCH, given)):
            expected = reference.evaluate(x, kept)
            with using(choices):
                found = runner.run(x, kept)
            assert (found.x - expected.logits).abs().max() < 2e-5
            assert all(map(torch.equal, found.choices, expected.kept))


@pytest.mark.parametrize(("case", "name"), [(SWIN, "layers.2.blocks.{}"), (CNN, "stages.2.{}")])
def test_a_routed_mlp_takes_two_launches(case, name):
    with using(TRITON):
        nodes = launched(runner_of(small_checkpoint(case), **SMALL), torch.zeros(1, 3, 64, 64))
    for block in (1, 2, 3):
        assert nodes[f"{name.format(block)}.mlp"] == ROUTED
        assert len(nodes[f"route.{block - 1}"]) == 3


def test_many_rows_take_no_more():
    """The launch before leaves their statistics, which else would be a launch."""
    with using(TRITON):
        nodes = launched(runner_of(small_checkpoint(SWIN), "float16", **SMALL), torch.zeros(128, 3, 64, 64))
    assert nodes["layers.2.blocks.1.mlp"] == ROUTED


def test_windows_are_mixed_by_the_kernel():
    """One launch for each kind of window: whole ones, or those that a shift cuts as well."""
    with using(TRITON):
        nodes = launched(runner_of(checkpoint(SWIN)), torch.zeros(1, 3, 224, 224))
    for block, kinds in (("2.blocks.0", 1), ("2.blocks.1", 4)):
        names = nodes[f"layers.{block}.attn"]
        assert sum(name.startswith("_attention") for name in names) == kinds
        assert not any("scaled_dot_product" in name or "softmax" in name for name in names)


def test_the_table_says_what_pytorch_runs():
    with using(TRITON):
        runtimes = [runner_of(checkpoint(CNN), image_size=size).runtime for size in (512, 528)]
    assert runtimes[0].endswith("by defaults: none was measured here; PyTorch for pooling")
    assert runtimes[1].endswith("; PyTorch for pooling, choosing among 1089 tokens")
