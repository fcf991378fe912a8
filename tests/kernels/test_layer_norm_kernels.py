"""The Triton launches of layer_norm and row_stats: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from dvit_kernels.layer_norm import launch_layer_norm, launch_row_stats
from kernel_helpers import QUICK, WHERE, assert_same_sums, collected, rms, run_guarded
from layer_norm_inputs import exact_norm, exact_stats, make_rows, make_vectors

from dvit_infer.ops.layer_norm import layer_norm_ref, row_stats_ref

# Leading sizes and C: tails of rows and of columns, one row, one column, every number of rows a program.
SHAPES = [
    ((3, 5), 40),
    ((1, 1), 384),
    pytest.param((2, 7), 192, marks=QUICK),
    ((9,), 96),
    ((), 64),
    ((2, 3, 2), 33),
    ((70, 1), 1),
    ((3,), 2048),
]


@pytest.mark.parametrize(("leading", "c"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_normalised_rows(device, dtype, leading, c):
    x = make_rows(*leading, c).to(device, dtype)
    for weight, bias in make_vectors(c, dtype, device):
        y = run_guarded(collected(launch_layer_norm, x, weight, bias, 1e-6), ["y_ptr"])["y_ptr"]
        assert y.shape == x.shape
        assert y.dtype == dtype
        expected, plain = exact_norm(x, weight, bias, 1e-6), layer_norm_ref(x, weight, bias, 1e-6)
        assert rms(y.cpu() - expected) <= 2 * rms(plain.cpu() - expected) + 1e-6


@pytest.mark.parametrize(("leading", "c"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_statistics(device, dtype, leading, c):
    x = make_rows(*leading, c).to(device, dtype)
    stats = run_guarded(collected(launch_row_stats, x), ["stats_ptr"])["stats_ptr"].cpu()
    expected, plain = exact_stats(x), row_stats_ref(x).cpu()
    assert stats.shape == expected.shape
    for i in range(2):
        error, plain_error = (rms(found[..., i] - expected[..., i]) for found in (stats, plain))
        assert error <= 2 * plain_error + 1e-6 * rms(expected[..., i])


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_rows_far_from_zero(device, dtype):
    """A mean that dwarfs the deviations: a sum of squares would lose them."""
    x = (make_rows(7, 384) + 200).to(device, dtype)
    expected = exact_norm(x, None, None, 1e-6)
    y, plain = launch_layer_norm(x, eps=1e-6), layer_norm_ref(x, eps=1e-6)
    assert rms(y.cpu() - expected) <= 2 * rms(plain.cpu() - expected) + 1e-5
    expected = exact_stats(x)
    assert rms((launch_row_stats(x).cpu() - expected) / expected) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_any_strides(device, dtype):
    wide = make_rows(6, 11, 128).to(device, dtype)
    views = (
        wide[::2, :, :64],
        wide[:, ::2, 64:],
        wide.transpose(0, 1)[:5, :, 1:65],
        wide[..., ::2],
        wide[:1].expand(3, -1, -1),
        wide[:, :1].expand(-1, 4, -1),
        wide[:, 0],
        wide[2, :, 3:40],
        wide.view(6, 11, 2, 64).transpose(1, 2),
        wide.transpose(1, 2),
    )
    for x in views:
        y = launch_layer_norm(x)
        assert_same_sums(y, launch_layer_norm(x.contiguous()))
        assert y.is_contiguous()
        assert_same_sums(launch_row_stats(x), launch_row_stats(x.contiguous()))


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_a_row_does_not_feel_its_neighbours(device, dtype):
    x = make_rows(9, 64).to(device, dtype)
    y, stats = launch_layer_norm(x), launch_row_stats(x)
    x[4, 63] = float("nan")
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(launch_layer_norm(x)[others], y[others])
    assert torch.equal(launch_row_stats(x)[others], stats[others])
    assert launch_layer_norm(x)[4].isnan().all()
    assert torch.equal(launch_layer_norm(x[2:3]), y[2:3])


def test_no_rows():
    for shape in ((0, 5, 64), (5, 0, 64), (0, 64)):
        x = torch.zeros(shape)
        assert launch_layer_norm(x).shape == shape
        assert launch_row_stats(x).shape == (0, 1, 2)


def test_widths_beyond_the_kernels_are_refused():
    for launch in (launch_layer_norm, launch_row_stats):
        with pytest.raises(ValueError, match=f"{launch.__name__}: x has 2049 channels"):
            launch(torch.zeros(1, 2049))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("b", "n", "c"), [(256, 197, 384), (1, 197, 768), (3, 577, 512), (256, 68, 192)])
def test_the_ops_on_cuda_run_the_kernels(b, n, c, dtype, monkeypatch):
    x, (weight, bias) = make_rows(b, n, c).to("cuda", dtype), make_vectors(c, dtype, "cuda")[1]
    y, stats = launch_layer_norm(x, weight, bias, 1e-6), launch_row_stats(x)
    expected = torch.nn.functional.layer_norm(x.double(), (c,), weight.double(), bias.double(), 1e-6)
    plain = layer_norm_ref(x, weight, bias, 1e-6)
    assert rms(y - expected) <= 2 * rms(plain - expected) + 1e-6
    monkeypatch.setattr("dvit_infer.ops.layer_norm.layer_norm_ref", None)
    monkeypatch.setattr("dvit_infer.ops.layer_norm.row_stats_ref", None)
    assert torch.equal(torch.ops.dvit.layer_norm(x, weight, bias, 1e-6), y)
    assert torch.equal(torch.ops.dvit.row_stats(x), stats)


@pytest.mark.gpu
def test_on_cuda_widths_beyond_the_kernels_run_in_pytorch():
    x = make_rows(3, 2050).cuda()
    assert torch.equal(torch.ops.dvit.layer_norm(x), layer_norm_ref(x))
    assert torch.equal(torch.ops.dvit.row_stats(x), row_stats_ref(x))
