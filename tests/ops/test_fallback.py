"""Kernels that fail or answer wrongly give way to PyTorch's operators, with one warning; in Triton's interpreter."""

import errno
import importlib
import warnings

import pytest
import torch
from failing_kernels import (
    OPS,
    TRITON,
    break_kernel,
    call_attention,
    call_keep_tokens,
    call_linear,
    call_merge_tokens,
    call_prune_tokens,
    does_not_compile,
    does_not_launch,
    make_rows,
    make_state,
    one_nan,
    one_percent_off,
)
from golden_cases import official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.errors import InputError, KernelError
from dvit_infer.ops import fallback
from dvit_infer.ops.choices import using
from dvit_infer.ops.keep_tokens import keep_tokens_ref, keep_tokens_with_stats
from dvit_infer.ops.layer_norm import layer_norm
from dvit_infer.ops.merge_tokens import merge_tokens, merge_tokens_ref, merge_tokens_with_stats
from dvit_infer.ops.route_tokens import order_of, route_tokens

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("_kernels_as_users_have_them")]
CPU = torch.device("cpu")
TINY = "tiny-deit-r0.7-s1"


@pytest.mark.parametrize("fault", [does_not_compile, does_not_launch, one_nan, one_percent_off])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.large)])
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
