"""Kernels that fail or answer wrongly give way to PyTorch's operators, with one warning; in Triton's interpreter."""

import errno
import importlib
import warnings

import pytest
import torch
from golden_cases import answers, case_images, official_checkpoint, options
from kernel_helpers import needs_loops
from routing_inputs import make_branches, make_order

import dvit_infer as dvit
from dvit_infer.backends.kernel_check import check_kernels
from dvit_infer.backends.state import State
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.errors import InputError, KernelError
from dvit_infer.ops import fallback
from dvit_infer.ops.attention import attention, attention_with_signal
from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.keep_tokens import keep_tokens, keep_tokens_ref, keep_tokens_with_stats
from dvit_infer.ops.layer_norm import layer_norm, row_stats
from dvit_infer.ops.linear import linear, row_sums
from dvit_infer.ops.merge_tokens import merge_tokens, merge_tokens_ref, merge_tokens_with_stats
from dvit_infer.ops.patch_embedding import pack_patch_embedding, patch_embedding
from dvit_infer.ops.route_tokens import order_of, route_tokens
from dvit_infer.ops.routed_mlp import routed_mlp

pytestmark = pytest.mark.interpreter
TRITON, PYTORCH, CPU = Choices(otherwise="triton"), Choices(otherwise="pytorch"), torch.device("cpu")
TINY, TINY_LVVIT = "tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch, tmp_path):
    """Nothing set, nothing given up on, nothing remembered."""
    monkeypatch.delenv("DVIT_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fallback, "_given_up", {})


def make_rows(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_linear(dim_in, dim_out, dtype):
    return (make_rows(dim_out, dim_in, seed=3) * 0.2).to(dtype), make_rows(dim_out, seed=4).to(dtype)


def call_linear(dtype):
    x, (weight, bias) = make_rows(3, 5, 32).to(dtype), make_linear(32, 48, dtype)
    return linear(x, weight, bias, make_rows(3, 5, 48, seed=2).to(dtype), row_sums(weight))[0]


def call_statistics(dtype):
    """Those that a linear leaves."""
    x, (weight, bias) = make_rows(3, 5, 32).to(dtype), make_linear(32, 64, dtype)
    return linear(x, weight, bias, stats_block=64)[1]


def call_attention(dtype):
    return attention(*make_rows(2, 7, 3 * 2 * 16).to(dtype).view(2, 7, 3, 2, 16).unbind(2))


def call_pair_attention(dtype):
    """Images take turns with three biases; the check looks at the first two images and the last two."""
    qkv = make_rows(6, 7, 3 * 2 * 16).to(dtype).view(6, 7, 3, 2, 16).unbind(2)
    return attention(*qkv, bias=make_rows(6, 7, seed=2), pair_bias=make_rows(3, 2, 7, 7, seed=3))


def call_signal(leaves):
    """The result or the signal: both are checked."""

    def call(dtype):
        q, k, v = make_rows(2, 7, 3 * 2 * 16).to(dtype).view(2, 7, 3, 2, 16).unbind(2)
        return attention_with_signal(q, k, v, None, make_rows(2, 7, seed=2), leaves)[1]

    return call


def call_merge_tokens(dtype):
    return merge_tokens(make_rows(3, 21, 64).to(dtype), make_rows(3, 21, 16, seed=2), make_rows(3, 21).exp(), 6)[0]


def call_keep_tokens(dtype):
    return keep_tokens(make_rows(3, 21, 64).to(dtype), make_rows(3, 2, 21, seed=2).softmax(dim=-1), 12)[0]


def call_patch_embedding(dtype):
    weight, table = (make_rows(*size) for size in ((32, 3, 4, 4), (1, 7, 32)))
    packed = pack_patch_embedding(weight, None, make_rows(1, 1, 32), table, dtype)
    return patch_embedding(make_rows(3, 3, 8, 12), *packed, 4)


def call_routed_mlp(which):
    """The result or its statistics: both are checked."""

    def call(dtype):
        x, (mlp, fast) = make_rows(3, 21, 64).to(dtype), make_branches(64, 48, dtype)
        return routed_mlp(x, x, make_order(3, 21, 12), 12, mlp, fast, stats_block=64)[which]

    return call


def make_state():
    """A predictor's weights, for 64 channels."""
    state, half = {}, 32
    for seed, (name, shape) in enumerate(
        {
            **{"in_conv.0.weight": (64,), "in_conv.0.bias": (64,), "in_conv.1.weight": (64, 64)},
            **{"in_conv.1.bias": (64,), "out_conv.0.weight": (half, 64), "out_conv.0.bias": (half,)},
            **{"out_conv.2.weight": (16, half), "out_conv.2.bias": (16,), "out_conv.4.weight": (2, 16)},
            "out_conv.4.bias": (2,),
        }.items()
    ):
        state[name] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return state


def call_prune_tokens(dtype):
    return dvit.prune_tokens(make_rows(3, 21, 64).to(dtype), make_state(), 12)[0]


# Op, where its launcher is, a call of it, which of the launcher's results is made wrong.
OPS = [
    pytest.param("linear", "linear", call_linear, 0, id="linear"),
    pytest.param("linear", "linear", call_statistics, 1, id="statistics"),
    pytest.param("attention", "attention", call_attention, None, id="attention"),
    pytest.param("attention", "attention", call_pair_attention, None, id="pair_bias"),
    pytest.param("layer_norm", "layer_norm", lambda d: layer_norm(make_rows(3, 5, 40).to(d)), None, id="layer_norm"),
    pytest.param("row_stats", "layer_norm", lambda d: row_stats(make_rows(7, 5, 40).to(d)), None, id="row_stats"),
    pytest.param("patch_embedding", "patch_embedding", call_patch_embedding, None, id="patch_embedding"),
    pytest.param("prune_tokens", "prune_tokens", call_prune_tokens, 0, id="prune_tokens"),
    pytest.param("attention_with_signal", "attention", call_signal("mean_keys"), 1, id="mean_keys"),
    pytest.param("attention_with_signal", "attention", call_signal("class_attention"), 1, id="class_attention"),
    pytest.param("merge_tokens", "merge_tokens", call_merge_tokens, 0, id="merge_tokens"),
    pytest.param("keep_tokens", "keep_tokens", call_keep_tokens, 0, id="keep_tokens"),
    pytest.param("routed_mlp", "routed_mlp", call_routed_mlp(0), 0, id="routed_mlp"),
    pytest.param("routed_mlp", "routed_mlp", call_routed_mlp(1), 1, id="routed_mlp-stats"),
]


class CompilationError(Exception):
    """Stands for the compiler's own kind."""


def does_not_compile(out):
    raise CompilationError("error: at 1:0: no such layout")


def does_not_launch(out):
    raise RuntimeError("Triton Error [CUDA]: invalid argument")


def one_nan(out):
    out = out.clone()
    out.view(-1)[0] = float("nan")
    return out


def one_percent_off(out):
    return out * 1.01


def all_of(launcher, fault, which):
    """The launcher with a fault in one of its results; and how often it was called."""
    calls = []

    def faulty(*given, **named):
        calls.append(1)
        out = launcher(*given, **named)
        return fault(out) if which is None else tuple(fault(o) if i == which else o for i, o in enumerate(out))

    return faulty, calls


def break_kernel(monkeypatch, op, module, fault, which):
    home, name = importlib.import_module(f"dvit_kernels.{module}"), f"launch_{op}"
    faulty, calls = all_of(getattr(home, name), fault, which)
    monkeypatch.setattr(home, name, faulty)
    return calls


@pytest.mark.parametrize("fault", [does_not_compile, does_not_launch, one_nan, one_percent_off])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("op", "module", "call", "which"), OPS)
def test_a_kernel_that_fails_is_replaced(monkeypatch, op, module, call, which, dtype, fault):
    calls = break_kernel(monkeypatch, op, module, fault, which)
    expected = call(dtype)  # on a CPU by PyTorch
    with using(TRITON), fallback.checking():
        with pytest.warns(RuntimeWarning, match=f"the kernel of {op} on cpu .*please report") as warned:
            got = call(dtype)
        assert len(warned) == len(calls) == 1
        torch.testing.assert_close(got, expected, equal_nan=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(call(dtype), expected, equal_nan=False)
    assert len(calls) == 1  # for the life of the process
    assert fallback.replaced(CPU) == [op]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("op", "module", "call", "which"), OPS)
def test_a_kernel_that_answers_right_stays(op, module, call, which, dtype):
    with using(TRITON), fallback.checking(), warnings.catch_warnings():
        warnings.simplefilter("error")
        call(dtype)
    assert fallback.replaced(CPU) == []


def test_prune_tokens_that_keeps_others_is_replaced(monkeypatch):
    def keep_the_first(x, packed, num_keep, num_prefix, eps):
        return x[:, : num_prefix + num_keep].contiguous(), torch.arange(num_keep).repeat(len(x), 1)

    expected = call_prune_tokens(torch.float32)
    monkeypatch.setattr("dvit_kernels.prune_tokens.launch_prune_tokens", keep_the_first)
    with using(TRITON), fallback.checking(), pytest.warns(RuntimeWarning, match="scores .* more than a kept one"):
        assert torch.equal(call_prune_tokens(torch.float32), expected)


def other_rows(rows):
    """Two tokens in each other's rows."""
    return rows[:, [0, 2, 1, *range(3, rows.shape[1])]]


def all_into_one(rows):
    return torch.where(rows > 9, 9, rows)


def beyond(rows):
    return rows + 15


@pytest.mark.parametrize(
    ("fault", "message"),
    [(other_rows, "do not follow from any"), (all_into_one, "do not follow from any"), (beyond, "not from 0 to 14")],
)
def test_merge_tokens_with_wrong_rows_is_replaced(monkeypatch, fault, message):
    break_kernel(monkeypatch, "merge_tokens", "merge_tokens", fault, 2)
    expected = call_merge_tokens(torch.float32)
    with using(TRITON), fallback.checking(), pytest.warns(RuntimeWarning, match=message):
        assert torch.equal(call_merge_tokens(torch.float32), expected)


@pytest.mark.parametrize("p", [0, 1])
def test_merge_tokens_of_other_matches_is_replaced(monkeypatch, p):
    def of_other_keys(x, keys, sizes, merge, num_prefix, stats):
        return merge_tokens_ref(x, keys.flip(2).roll(1, 1), sizes, merge, num_prefix)

    given = make_rows(3, 21, 64), make_rows(3, 21, 16, seed=2), None, 6, p
    expected = merge_tokens(*given)
    monkeypatch.setattr("dvit_kernels.merge_tokens.launch_merge_tokens", of_other_keys)
    with using(TRITON), fallback.checking(), pytest.warns(RuntimeWarning, match="less similar than one that was left"):
        assert all(torch.equal(a, b) for a, b in zip(merge_tokens(*given), expected, strict=True))


def test_keep_tokens_that_keeps_others_is_replaced(monkeypatch):
    def keep_the_first(x, attention, num_keep, num_prefix, fuse, stats):
        return keep_tokens_ref(x, attention.flip(2), num_keep, num_prefix, fuse)

    expected = call_keep_tokens(torch.float32)
    monkeypatch.setattr("dvit_kernels.keep_tokens.launch_keep_tokens", keep_the_first)
    with using(TRITON), fallback.checking(), pytest.warns(RuntimeWarning, match="scores .* more than a kept one"):
        assert torch.equal(call_keep_tokens(torch.float32), expected)


def first_ones(order):
    return order_of(torch.arange(12).repeat(3, 1), 21)


def falling(order):
    return order.flip(1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(first_ones, "scores .* more than a kept one"), (falling, "order is not that of"), (beyond, "not from 0 to 20")],
)
def test_route_tokens_in_a_wrong_order_is_replaced(monkeypatch, fault, message):
    given = make_rows(3, 21, 64), dvit.pack_predictor(make_state()), 12
    expected = route_tokens(*given)
    with using(TRITON), fallback.checking(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(route_tokens(*given), expected)  # a right one stays
    break_kernel(monkeypatch, "route_tokens", "route_tokens", fault, None)
    with using(TRITON), fallback.checking(), pytest.warns(RuntimeWarning, match=message):
        assert torch.equal(route_tokens(*given), expected)


@pytest.mark.parametrize("op", [merge_tokens_with_stats, keep_tokens_with_stats])
def test_statistics_that_are_off_are_replaced(monkeypatch, op):
    """By none: the next linear finds them itself."""
    name = op.__name__.removesuffix("_with_stats")
    module = importlib.import_module(f"dvit_kernels.{name}")
    launch = getattr(module, f"launch_{name}")

    def off(*given):
        result = launch(*given)
        given[-1].mul_(1.01)
        return result

    second = make_rows(3, 21, 16, seed=2) if name == "merge_tokens" else make_rows(3, 2, 21).softmax(dim=-1)
    given = make_rows(3, 21, 128), second, *((None,) if name == "merge_tokens" else ()), 6, 1
    with using(TRITON):
        expected, stats = op(*given)
        assert stats is not None
        monkeypatch.setattr(module, f"launch_{name}", off)
        with fallback.checking(), pytest.warns(RuntimeWarning, match="wrong results"):
            found, stats = op(*given)
    assert stats is None
    torch.testing.assert_close(found, expected)


def engine_by_kernels(case_id=TINY, dtype="float32"):
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", dtype=dtype, **options(case_id))
    with using(TRITON):
        engine.runner = TritonRunner(engine.graph)
    engine.runner.checks_kernels = True
    return engine


@pytest.mark.slow
@needs_loops
def test_an_engine_answers_right_and_says_so(monkeypatch, tmp_path):
    break_kernel(monkeypatch, "attention", "attention", one_percent_off, None)
    expected, _, _ = answers(TINY_LVVIT)  # of small images: the interpreter is slow
    engine = engine_by_kernels(TINY_LVVIT)
    assert "in place of" not in str(engine.graph)
    with using(TRITON):
        with pytest.warns(RuntimeWarning, match="the kernel of attention") as warned:
            logits = engine(case_images(TINY_LVVIT)[:1])
        assert (logits - expected[:1]).abs().max() < 2e-5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine(case_images(TINY_LVVIT)[:1])
    assert len(warned) == 1
    assert "PyTorch in place of attention, which failed" in str(engine.graph)
    assert not (tmp_path / "cache").exists()  # what failed is looked at again


@needs_loops
def test_what_passed_is_remembered(monkeypatch, tmp_path):
    graph, seen = engine_by_kernels().graph, []
    forward = seen.append
    with using(TRITON):
        for _ in range(2):
            check_kernels(graph, 3, False, False, forward)
        assert [tuple(images.shape) for images in seen] == [(3, 3, *graph.config.image_size)]
        assert torch.equal(seen[0][0], seen[0][2])
        assert not torch.equal(seen[0][0], seen[0][1])
        (marker,) = (tmp_path / "cache" / "dvit_infer" / "kernels").iterdir()
        assert {"gpu", "driver", "torch", "triton", "dvit_infer"} <= set(marker.read_text().split('"'))
        check_kernels(graph, 2, False, False, forward)  # another size takes other tiles
        check_kernels(graph, 2, True, False, forward)
        check_kernels(graph, 2, False, True, forward)
        monkeypatch.setattr("dvit_infer.backends.kernel_check._system", lambda device: {"triton": "3.99"})
        check_kernels(graph, 3, False, False, forward)
    assert len(seen) == 5
    assert seen[2].dtype == torch.uint8


@needs_loops
def test_a_cache_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with using(TRITON):
        for seen in ([], []):
            check_kernels(engine_by_kernels().graph, 1, False, False, seen.append)
            assert len(seen) == 1


@pytest.mark.slow
@needs_loops
def test_a_captured_forward_may_begin_at_the_tokens():
    """Tokens made in memory that is there, of images in any dtype and strides, give the answers of a plain call."""
    engine, images = engine_by_kernels(), case_images(TINY)[:1]
    runner = engine.runner
    tokens = torch.full((1, *runner.nodes[0].out_shape), float("nan"))
    raw = (images * 60 + 120).clamp(0, 255).to(torch.uint8)
    with using(PYTORCH):  # the patch embedding is a kernel in any case
        for given in (images.double().transpose(2, 3).contiguous().transpose(2, 3), raw):
            expected = runner.run(given)
            runner.embed_into(given, tokens)
            found = runner.run_nodes(State(tokens), runner.nodes[1:])
            torch.testing.assert_close(found.x, expected.x, atol=1e-6, rtol=0)
            assert all(torch.equal(a, b) for a, b in zip(found.choices, expected.choices, strict=True))
    plain = dvit.convert(official_checkpoint(TINY), device="cpu", backend="torch", **options(TINY))
    plain.runner.embed_into(images, tokens)
    assert torch.equal(plain.runner.run_nodes(State(tokens), plain.runner.nodes[1:]).x, plain(images))


@pytest.mark.parametrize("fault", [does_not_compile, one_percent_off])
def test_required_kernels_that_fail_are_an_error(monkeypatch, fault):
    monkeypatch.setenv("DVIT_KERNELS", "require")
    break_kernel(monkeypatch, "attention", "attention", fault, None)
    with using(TRITON), fallback.checking(), pytest.raises(KernelError, match=r"attention on cpu .*=require forbids"):
        call_attention(torch.float32)


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("DVIT_KERNELS", "off")
    calls = break_kernel(monkeypatch, "attention", "attention", does_not_launch, None)
    with using(TRITON):
        call_attention(torch.float32)
    assert calls == []


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("DVIT_KERNELS", "on")
    with pytest.raises(InputError, match=r"^DVIT_KERNELS: 'on'; require, off or nothing is expected$"):
        dvit.convert(official_checkpoint(TINY), device="cpu", **options(TINY))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "no C compiler"),
        (PermissionError(errno.EACCES, "Permission denied", "/home/me/.triton"), "cannot write to /home/me/.triton"),
        (OSError(errno.EROFS, "Read-only file system", "/home/me/.triton"), "cannot write to /home/me/.triton"),
    ],
)
def test_what_ails_every_kernel_is_told_once(monkeypatch, error, says):
    def ails(out):
        raise error

    for op in ("attention", "linear"):
        break_kernel(monkeypatch, op, op, ails, None)
    with using(TRITON):
        with pytest.warns(RuntimeWarning, match=f"every kernel on cpu fails: .*{says}") as warned:
            call_attention(torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call_linear(torch.float32)
            layer_norm(make_rows(3, 40))
    assert len(warned) == 1
    assert "report" not in str(warned[0].message)


def test_too_little_memory_is_no_fault_of_the_kernel(monkeypatch):
    def is_short(out):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    break_kernel(monkeypatch, "attention", "attention", is_short, None)
    with using(TRITON), pytest.raises(torch.OutOfMemoryError):
        call_attention(torch.float32)
    assert fallback.replaced(CPU) == []
