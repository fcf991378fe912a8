"""The Triton launch of linear: on a GPU where there is one, in Triton's interpreter elsewhere."""

import itertools

import pytest
import torch
from dvit_kernels.linear import (
    FLOAT32_TILE,
    TILES,
    LinearTile,
    default_stats_block,
    default_tile,
    launch_linear,
)
from kernel_helpers import LARGE, QUICK, WHERE, assert_same_sums, check, collected, rms, run_guarded
from linear_inputs import exact_linear, exact_stats, make_linear, make_rows
from torch.nn import functional as F

from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.linear import ACTIVATIONS, linear, linear_ref, row_sums

# Leading sizes, C, K: tails of rows, columns and inner blocks; one row; one token an image; more than a tile.
SHAPES = [
    pytest.param((3, 7), 64, 96, marks=QUICK),
    ((1, 1), 40, 16),
    ((5, 1), 72, 33),
    ((2, 50), 32, 64),
    pytest.param((70,), 144, 65, marks=LARGE),
    ((9,), 1, 1),
]


@pytest.mark.parametrize(("leading", "dim_in", "dim_out"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_every_epilogue(device, dtype, leading, dim_in, dim_out):
    x = make_rows(*leading, dim_in).to(device, dtype)
    weight, bias = (t.to(device) for t in make_linear(dim_in, dim_out, dtype))
    residual = make_rows(*leading, dim_out, seed=2).to(device, dtype)
    activations = itertools.cycle(ACTIVATIONS)
    for norm, with_bias, with_residual in itertools.product([False, True], repeat=3):
        given = weight, bias if with_bias else None, residual if with_residual else None
        sums, activation = row_sums(weight) if norm else None, next(activations)
        y = run_guarded(collected(launch_linear, x, *given, sums, None, 1e-6, activation), ["y_ptr"])["y_ptr"]
        plain, _ = linear_ref(x, *given, sums, None, 1e-6, activation)
        check(y, exact_linear(x, *given, norm, 1e-6, activation), plain)
        if dim_in == 1:
            return  # a row of one channel has no deviation: LayerNorm of it is rounding alone


# Leading sizes, C, K: tails; odd K, of which the last column's gate and factor stand alone; rows of a large tile.
GATED = [
    pytest.param((3, 7), 64, 96, "silu", marks=QUICK),
    ((1, 1), 40, 17, "gelu"),
    pytest.param((2, 50), 72, 33, "gelu_tanh", marks=LARGE),
]


@pytest.mark.parametrize(("leading", "dim_in", "dim_out", "activation"), GATED)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_gates(device, dtype, leading, dim_in, dim_out, activation):
    """Each product's first half is a gate of its second; statistics are of what is stored."""
    x = make_rows(*leading, dim_in).to(device, dtype)
    weight, bias = (t.to(device) for t in make_linear(dim_in, 2 * dim_out, dtype))
    residual = make_rows(*leading, dim_out, seed=2).to(device, dtype)
    for norm, given in ((True, (weight, bias, None)), (False, (weight, None, residual))):
        sums = row_sums(weight) if norm else None
        launches = collected(launch_linear, x, *given, sums, None, 1e-6, activation, gated=True)
        y = run_guarded(launches, ["y_ptr"])["y_ptr"]
        plain, _ = linear_ref(x, *given, sums, None, 1e-6, activation, gated=True)
        check(y, exact_linear(x, *given, norm, 1e-6, activation, True), plain)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_statistics_of_a_gated_result(device, dtype):
    x, (weight, bias) = make_rows(5, 64).to(device, dtype), (t.to(device) for t in make_linear(64, 96, dtype))
    given = weight, bias, None, None, None, 1e-6, "silu", 16, None, True
    launches = collected(launch_linear, x, *given, tile=LinearTile(16, 32, 16, 4, 2))
    y, stats = run_guarded(launches, ["y_ptr", "y_stats_ptr"]).values()
    assert (y.shape, stats.shape) == ((5, 48), (5, 3, 2))
    assert rms((stats.cpu() - exact_stats(y, 16)) / exact_stats(y, 16)) <= 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_activations_far_out(device, dtype, activation):
    """Of any finite number, and of NaN."""
    ends = [float("nan"), -60000.0, 60000.0, -100.0, 100.0, -9.0, 9.0, 0.0, -0.0]
    x = torch.tensor([*ends, *torch.linspace(-6, 6, 53).tolist()]).to(device, dtype)[:, None]
    one = torch.ones(1, 1, device=device, dtype=dtype)
    y, _ = launch_linear(x, one, activation=activation, out_dtype=torch.float32)
    expected = exact_linear(x, one, activation=activation)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
def test_gelu_by_the_own_tanh_of_a_gpu():
    """PTX ISA, tanh.approx.f32: 2^-11 from tanh, relatively, at most."""
    x = torch.tensor([float("nan"), -60000.0, 60000.0, *torch.linspace(-20, 20, 4001).tolist()])[:, None].cuda()
    y, _ = launch_linear(x, torch.ones(1, 1, device="cuda"), activation="gelu_tanh_approx")
    expected = F.gelu(x.double(), approximate="tanh")
    assert y[0].isnan()
    assert y[1:3, 0].tolist() == [0.0, 60000.0]
    assert torch.all((y - expected)[3:].abs() <= x[3:].abs() * 2**-12 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [*TILES, FLOAT32_TILE, LinearTile(16, 16, 16, 1, 2)])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_every_tile_and_its_statistics(device, dtype, tile):
    """The statistics that one launch leaves are of what it stored, and the next normalises by them."""
    if dtype == torch.float32 and tile in TILES and device == "cuda":
        pytest.skip("its registers would spill")
    dim_out = 2 * tile.block_n
    x, residual = make_rows(2, 37, 96).to(device, dtype), (make_rows(2, 37, dim_out) + 3).to(device, dtype)
    weight, bias = (t.to(device) for t in make_linear(96, dim_out, dtype))
    launches = collected(launch_linear, x, weight, bias, residual, stats_block=tile.block_n, tile=tile)
    y, stats = run_guarded(launches, ["y_ptr", "y_stats_ptr"]).values()
    plain, _ = linear_ref(x, weight, bias, residual)
    check(y, exact_linear(x, weight, bias, residual), plain)
    expected = exact_stats(y, tile.block_n)
    assert stats.shape == expected.shape == (74, 2, 2)
    assert rms((stats.cpu() - expected) / expected) <= 1e-5

    weight, bias = (t.to(device) for t in make_linear(dim_out, 40, dtype))
    given = weight, bias, None, row_sums(weight)
    normalised, _ = launch_linear(y, *given, stats, activation="gelu", tile=tile)
    plain, _ = linear_ref(y, *given, activation="gelu")
    check(normalised, exact_linear(y, weight, bias, norm=True, activation="gelu"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_every_tile_finds_statistics(device, dtype, tile):
    """Of rows of several inner blocks, out of the tiles that the product reads."""
    if dtype == torch.float32 and device == "cuda":
        pytest.skip("its registers would spill")
    x = make_rows(tile.block_m + 5, 328).to(device, dtype)
    weight, bias = (t.to(device) for t in make_linear(328, tile.block_n + 8, dtype))
    given = weight, bias, None, row_sums(weight)
    y, _ = launch_linear(x, *given, tile=tile)
    check(y, exact_linear(x, weight, bias, norm=True), linear_ref(x, *given)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_any_strides(device, dtype):
    weight, bias = (t.to(device) for t in make_linear(64, 48, dtype))
    wide = make_rows(6, 11, 128).to(device, dtype)
    for x in (
        wide[::2, :, :64],
        wide[:, ::2, 64:],
        wide[:, :1, :64],  # one row an image, as a class token
        wide.transpose(0, 1)[:5, :, 1:65],
        wide[..., ::2],
        wide[:1, :, :64].expand(3, -1, -1),
        wide[0, :, :64],
        wide[0, 0, :64],
        wide.view(2, 3, 11, 128)[:, 1:, :, :64],
    ):
        expected, _ = launch_linear(x.contiguous(), weight, bias, x[..., :48].contiguous(), row_sums(weight))
        in_line = F.pad(x[..., :48], (8, 0))[..., 8:]
        apart = F.pad(x[..., :48], (8, 0, 0, 1))[..., :-1, 8:] if x.ndim > 1 else in_line
        for residual in (x[..., :48], x[..., :48].contiguous(), in_line, apart):
            y, stats = launch_linear(x, weight, bias, residual, row_sums(weight))
            assert_same_sums(y, expected)
        assert y.is_contiguous()
        assert stats.numel() == 0


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_any_strides_of_the_vectors(device, dtype):
    weight, bias = (t.to(device) for t in make_linear(64, 64, dtype))
    x, sums = make_rows(5, 64).to(device, dtype), row_sums(weight)
    _, stats = launch_linear(x, weight, None, x, stats_block=32, tile=LinearTile(16, 32, 16, 4, 2))
    expected, _ = launch_linear(x, weight, bias, None, sums, stats)
    apart = [torch.stack([t, -t], dim=-1)[..., 0] for t in (bias, sums, stats)]
    assert torch.equal(launch_linear(x, weight, apart[0], None, apart[1], apart[2])[0], expected)
    one = bias[:1].expand(64)
    assert torch.equal(launch_linear(x, weight, one)[0], launch_linear(x, weight, one.contiguous())[0])


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_a_row_does_not_feel_its_neighbours(device, dtype):
    """Neither NaN in another row of the tile, nor what stands in memory around x."""
    weight, bias = (t.to(device) for t in make_linear(40, 48, dtype))
    memory = torch.full((3, 9, 80), float("nan")).to(device, dtype)
    x = memory[:, 1:8, 20:60].copy_(make_rows(3, 7, 40))
    given = weight, bias, None, row_sums(weight)
    expected, _ = launch_linear(x.clone(), *given, activation="gelu_tanh")
    alone, _ = launch_linear(x, *given, activation="gelu_tanh")
    assert_same_sums(alone, expected)
    x[1, 3, 5] = float("nan")
    y, _ = launch_linear(x, *given, activation="gelu_tanh")
    assert y[1, 3].isnan().all()
    y[1, 3] = alone[1, 3]
    assert torch.equal(y, alone)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_rows_far_from_zero(device, dtype):
    """The folded LayerNorm subtracts a mean that dwarfs the deviations; rounding counts mean/std times."""
    x = (make_rows(9, 64) + 50).to(device, dtype)
    weight, bias = (t.to(device) for t in make_linear(64, 48, dtype))
    given = weight, bias, None, row_sums(weight)
    y, _ = launch_linear(x, *given)
    expected = exact_linear(x, weight, bias, norm=True)
    plain, _ = linear_ref(x, *given)
    amplified = 25 * torch.finfo(torch.float32).eps * 8  # mean/std, float32 products, their sums
    assert rms(y.cpu() - expected) <= 2 * rms(plain.cpu() - expected) + amplified


def test_tiles_chosen_by_default():
    half = torch.bfloat16
    assert default_tile(50432, 1152, half) == TILES[0]
    assert default_tile(197, 384, half) == TILES[-1]
    assert default_tile(197, 384, torch.float32) == FLOAT32_TILE
    assert default_tile(50432, 384, half, stats_block=64).block_n == 64
    assert [default_stats_block(50432, dim, half) for dim in (384, 768, 192, 240, 10)] == [128, 128, 64, 0, 0]
    assert default_stats_block(197, 384, half) == 32
    assert LinearTile(128, 128, 64, 8, 3) == LinearTile(128, 128, 64, 8, 3, 0) == TILES[0]
    with pytest.raises(ValueError, match="stats_block 48"):
        default_tile(197, 384, half, stats_block=48)


def test_no_rows():
    weight, bias = make_linear(64, 96)
    y, stats = launch_linear(torch.zeros(0, 7, 64), weight, bias, stats_block=32, tile=LinearTile(32, 32, 16, 4, 2))
    assert (y.shape, stats.shape) == ((0, 7, 96), (0, 3, 2))


@pytest.mark.parametrize("stats_block", [16, 64, 128])
def test_statistics_that_a_tile_does_not_have_are_refused(stats_block):
    weight, _ = make_linear(64, 96)
    with pytest.raises(ValueError, match=f"stats_block {stats_block}"):
        launch_linear(torch.zeros(3, 64), weight, stats_block=stats_block)


@pytest.mark.interpreter
@pytest.mark.parametrize("stats_block", [16, 32, 48, 96])
def test_the_op_leaves_statistics_of_any_block(stats_block):
    """Of one that no tile has as well: from the result, by PyTorch."""
    x, (weight, bias) = make_rows(5, 64), make_linear(64, 96)
    with using(Choices(otherwise="triton")):
        y, stats = linear(x, weight, bias, stats_block=stats_block)
    expected = exact_stats(y, stats_block)
    assert stats.shape == expected.shape
    torch.testing.assert_close(stats.double(), expected, rtol=1e-5, atol=1e-5)


# Rows, C, K, and what surrounds them: DeiT-S at batch 256, DeiT-B, a class token's row, LV-ViT's auxiliary head.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "dim_in", "dim_out", "norm", "activation", "residual"),
    [
        (50432, 384, 1152, True, "none", False),
        (50432, 384, 1536, True, "gelu_tanh", False),
        (17408, 1536, 384, False, "none", True),
        (24832, 768, 3072, True, "gelu_poly", False),
        (35328, 3072, 768, False, "none", True),
        (256, 384, 1000, True, "none", False),
        (197, 384, 1152, True, "none", False),
        (68, 1536, 384, False, "none", True),
        (1, 768, 768, False, "none", True),
    ],
)
def test_shapes_of_the_models(rows, dim_in, dim_out, norm, activation, residual, dtype):
    x = make_rows(rows, dim_in).to("cuda", dtype)
    weight, bias = (t.cuda() for t in make_linear(dim_in, dim_out, dtype))
    other = make_rows(rows, dim_out, seed=2).to("cuda", dtype) if residual else None
    given = weight, bias, other, row_sums(weight) if norm else None
    y, _ = launch_linear(x, *given, None, 1e-6, activation)
    plain, _ = linear_ref(x, *given, None, 1e-6, activation)
    some = torch.arange(0, rows, max(1, rows // 997))
    expected = exact_linear(x[some], weight, bias, None if other is None else other[some], norm, 1e-6, activation)
    check(y[some.cuda()], expected, plain[some.cuda()])
    assert torch.isfinite(y).all()
    again, _ = launch_linear(x, *given, None, 1e-6, activation)
    assert torch.equal(again, y)
