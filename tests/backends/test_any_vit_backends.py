"""Every kind of vision transformer by every backend: the reference's answers, and what the table says runs it."""

from dataclasses import replace

import pytest
import torch
from any_vit import DROPPING, KINDS, agrees, every_kind, tiny
from dvit_kernels.launch import collecting
from kernel_helpers import needs_loops
from torch.utils._python_dispatch import TorchDispatchMode

import dvit_infer as dvit
from dvit_infer.backends.cpu import CpuRunner, Linear
from dvit_infer.backends.kernel_check import _name
from dvit_infer.backends.state import State
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.graph import Graph, fold
from dvit_infer.ops.activations import activate
from dvit_infer.ops.choices import Choices, using

TRITON, PYTORCH = Choices(otherwise="triton"), Choices(otherwise="pytorch")
LINEARS = [Linear(torch.float32, prepacked=False), Linear(torch.float32, prepacked=True)]
QUICK = ("clip", "eva02", "beit", "siglip")  # together every part that the Triton backend runs in a way of its own


@pytest.mark.parametrize("method", DROPPING)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_backend(kind, method):
    model = tiny(kind, method, size=(24, 40))
    graph = fold(model.graph())
    for linear in LINEARS:
        agrees(CpuRunner(graph, linear), model)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "random"])
@pytest.mark.parametrize("kind", every_kind(*QUICK))
def test_reduced_precision_is_verified(kind, method):
    """At most twice the error of plain PyTorch: logits, features, and every node."""
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny(kind, method)
        engine = model.engine(dtype)
        for runner in (engine.runner, TorchRunner(engine.graph)):
            engine.runner = runner
            report = dvit.verify(engine, model.state, num_images=8)
            assert report.passed, report
            assert report.first_difference is None, report


@pytest.mark.interpreter
@needs_loops
@pytest.mark.parametrize("kind", every_kind(*QUICK, "distilled"))
def test_the_triton_backend_around_its_kernels(kind):
    """With PyTorch in place of linears and attention, which are slow to interpret."""
    model = tiny(kind, "random", size=(24, 16))
    with using(PYTORCH):
        agrees(TritonRunner(fold(model.graph())), model, batches=(1,) if kind in QUICK else (3, 1))


@pytest.mark.large
@pytest.mark.interpreter
@needs_loops
@pytest.mark.parametrize("kind", ["dinov2-registers", "dinov3", "qk-norm", *QUICK])
def test_the_triton_backends_kernels(kind):
    model = tiny(kind, "random" if kind in QUICK else "none", size=(24, 16))
    with using(TRITON):
        agrees(TritonRunner(fold(model.graph())), model, batches=(2,))


@pytest.mark.slow
@pytest.mark.interpreter
@needs_loops
@pytest.mark.parametrize("kind", ["dinov2-registers", "dinov3", *QUICK])
def test_a_whole_block_by_the_triton_backend_in_float16(kind):
    model = tiny(kind, "random", size=(24, 16), depth=1)
    engine = model.engine(torch.float16)
    with using(TRITON):
        engine.runner = TritonRunner(engine.graph)
        report = dvit.verify(engine, model.state, num_images=2)
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.interpreter
@needs_loops
@pytest.mark.parametrize("head_dim", [72, 80, 88, 104])
def test_the_attention_kernel_takes_heads_of_any_usual_size(head_dim):
    model = tiny("eva02-token", size=(16, 16), embed_dim=head_dim, num_heads=1, depth=1)
    with using(TRITON):
        runner = TritonRunner(fold(model.graph()))
        agrees(runner, model, batches=(1,))
    assert "attention" not in runner.runtime


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("deit", ""),
        ("clip", "; PyTorch for pooling"),
        ("eva02-token", ""),
        ("beit-shared", ""),
        ("siglip", ""),
    ],
)
def test_the_table_says_what_pytorch_runs(kind, says):
    graph = fold(tiny(kind).graph())
    for choices in (TRITON, PYTORCH):
        with using(choices):
            shown = str(replace(graph, runtime=TritonRunner(graph).runtime))
        assert shown.splitlines()[-1] == f"run by Triton and cuBLAS, by defaults: none was measured here{says}"


class _Apart(TorchDispatchMode):
    """Notes PyTorch's operators, but those of ours and what only views or allocates."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(result.alias_info for result in func._schema.returns)
        if func.namespace == "aten" and not views and "empty" not in func.name():
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["deit", "clip", "dinov2-registers", "dinov3", "eva02", "mixed", "qk-norm", "siglip"])
def test_a_block_of_any_kind_takes_five_launches(kind):
    """As many as DeiT's, also after tokens were dropped: places, gates and norms come with them."""
    model = tiny(kind)
    with using(TRITON), torch.no_grad():
        runner = TritonRunner(fold(model.graph()))
        block = [node for node in runner.nodes if node.name in ("blocks.0.attn", "blocks.0.mlp")]
        state = State(torch.zeros(2, *block[0].in_shape))
        patches = model.config.num_patches
        state.positions = torch.arange(patches).flip(0).expand(2, -1)
        with collecting() as launches, _Apart() as apart:
            runner.run_nodes(state, block)
    assert [launch.kernel.__name__ for launch in launches] == [
        *("_linear_kernel", "_attention_online_kernel", "_linear_kernel"),
        *("_linear_kernel", "_linear_kernel"),
    ]
    assert apart.seen == []


def test_attention_pooling_takes_seven_launches():
    with using(TRITON), torch.no_grad():
        runner = TritonRunner(fold(tiny("siglip").graph()))
        pool = runner.nodes[-1]
        state = State(torch.zeros(2, *pool.in_shape))
        with collecting() as launches, _Apart() as apart:
            runner.run_nodes(state, [pool])
    assert len(launches) == 7
    assert apart.seen == []


def test_heads_that_no_kernel_takes_are_said():
    with using(TRITON):
        runner = TritonRunner(fold(tiny("deit", embed_dim=24).graph()))
    assert runner.runtime.endswith("; PyTorch for attention of heads of 12 channels")


def test_an_unfolded_graph_is_refused():
    for kind in ("deit", "dinov2-registers"):
        with using(TRITON), pytest.raises(ValueError, match=r"blocks\.0\.attn is not folded"):
            TritonRunner(tiny(kind).graph())


def test_an_activation_that_nobody_knows_is_no_gelu():
    with pytest.raises(ValueError, match="'gelu_poly' is not known"):
        activate(torch.zeros(1), "gelu_poly")


def test_what_decides_the_kernels_is_on_record():
    """A pass of one model is none of another that has the same shapes."""

    def name(graph: Graph) -> str:
        with using(TRITON):
            return _name(graph, 1, False, False)

    names = [name(fold(tiny("deit", act=act).graph())) for act in ("gelu", "gelu_tanh", "silu", "gelu")]
    assert len(set(names)) == 3
    assert names[0] == names[3]
    assert name(fold(tiny("dinov2-registers", gated="packed", mlp_dim=48).graph())) != name(
        fold(tiny("dinov2-registers", gated="", mlp_dim=96).graph())
    )
