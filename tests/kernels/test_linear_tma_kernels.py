"""The TMA form of linear against the plain one: on a GPU that has it, in Triton's interpreter elsewhere."""

import dataclasses

import pytest
import torch
from dvit_kernels.linear import (
    TILES,
    LinearTile,
    launch_linear,
)
from dvit_kernels.linear_tma import PAIRED, PREFETCHING
from kernel_helpers import EMULATED, QUICK, WHERE, check, collected, needs_loops, rms, run_guarded
from linear_inputs import exact_linear, exact_stats, make_linear, make_rows

from dvit_infer.ops.linear import ACTIVATIONS, linear_ref, row_sums

ROWS = [where for where in WHERE if pytest.mark.emulated(80) not in where.marks]
HALF = [where for where in ROWS if where.values[1] != torch.float32]
# By TMA: as tuned on a GPU; small ones for the interpreter; both compiled for a GPU that is not here.
TUNED = [LinearTile(128, 128, 64, 8, 4, PREFETCHING), LinearTile(128, 128, 64, 8, 3, PAIRED)]
SMALL = [LinearTile(32, 16, 32, 4, 2, variant) for variant in (PREFETCHING, PAIRED)]
TMA_TILES = {"cuda": TUNED, "cpu": TUNED + SMALL if WHERE == EMULATED else SMALL}


skip_before_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no TMA before Hopper"
)


def of_tma(launch):
    return launch.kernel.__name__ == "_linear_tma_kernel"


@pytest.mark.slow
@needs_loops
@skip_before_hopper
@pytest.mark.parametrize("variant", [PREFETCHING, PAIRED])
@pytest.mark.parametrize(("device", "dtype"), HALF)
def test_tma_does_as_the_plain_kernel(device, dtype, variant):
    """Every epilogue, tails of rows and of columns, more tiles than programs, several parts of statistics."""
    for tile in (tile for tile in TMA_TILES[device] if tile.tma == variant):
        rows, dim_in = 3 * tile.block_m + 5, 3 * tile.block_k
        x = make_rows(rows, dim_in).to(device, dtype)
        for dim_out, activations in ((2 * tile.block_n, ACTIVATIONS), (tile.block_n + 9, ("none", "gelu_tanh"))):
            weight, bias = (t.to(device) for t in make_linear(dim_in, dim_out, dtype))
            residual = make_rows(rows, dim_out, seed=2).to(device, dtype)
            stats = torch.stack(torch_stats(x, 3), dim=2)
            sums = row_sums(weight)
            epilogues = [(weight, bias, None, sums, stats, 1e-6, activation) for activation in activations]
            epilogues += [(weight, None, residual, None, None, 1e-6, "none")]
            epilogues += [(weight, bias, residual, sums, stats, 1e-6, "gelu")]
            for given in epilogues:
                block = 0 if dim_out % tile.block_n else tile.block_n
                [launch] = collected(launch_linear, x, *given, stats_block=block, tile=tile)
                assert of_tma(launch)
                few = dataclasses.replace(launch, grid=(3,))
                outputs = run_guarded([few], ["y_ptr", "y_stats_ptr"] if block else ["y_ptr"])
                plain, _ = launch_linear(x, *given, tile=dataclasses.replace(TILES[2], block_k=32))
                expected = exact_linear(x, *given[:3], given[3] is not None, *given[5:])
                check(outputs["y_ptr"], expected, plain)
                if block:
                    exact = exact_stats(outputs["y_ptr"], block)
                    assert rms((outputs["y_stats_ptr"].cpu() - exact) / exact) <= 1e-5
                again, _ = launch_linear(x, *given, tile=tile)
                assert torch.equal(again, outputs["y_ptr"])


def torch_stats(x, parts):
    """Mean and sum of squared deviations of each of so many parts of the rows of x."""
    split = x.float().reshape(len(x), parts, -1)
    return split.mean(dim=2), split.var(dim=2, correction=0) * split.shape[2]


@needs_loops
@skip_before_hopper
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_what_tma_cannot_read_takes_the_plain_kernel(device, dtype):
    tile = TMA_TILES[device][0]
    c = 2 * tile.block_k
    dim_out = 2 * tile.block_n
    wide = make_rows(2, 10, c + 8).to(device, dtype)
    memory = make_rows(10 * c + 1).to(device, dtype)
    weight, bias = (t.to(device) for t in make_linear(c, dim_out, dtype))
    cases = {
        "whole": (wide[..., :c].contiguous(), True),
        "every row": (wide[..., :c], True),
        "one image": (wide[0, :, :c], True),
        "a class token": (wide[:, :1, :c], True),
        "some rows": (wide[:, :7, :c], False),
        "the same row": (wide[:1, :1, :c].expand(2, 4, -1), False),
        "rows of no multiple of 16 bytes": (make_rows(4, c + 1).to(device, dtype)[:, :c], False),
        "from an odd address": (memory[1:].view(10, c), False),
        "no rows": (wide[:0, :, :c], False),
    }
    for name, (x, described) in cases.items():
        some = make_rows(*x.shape[:-2], x.shape[-2] + 1, dim_out + 8).to(device, dtype)
        residual = some[..., :-1, 8:] if described else some[..., :-1, 8:].contiguous()
        [launch] = collected(launch_linear, x, weight, bias, residual, stats_block=tile.block_n, tile=tile)
        assert of_tma(launch) == (described and dtype != torch.float32), name
        y, stats = launch_linear(x, weight, bias, residual, stats_block=tile.block_n, tile=tile)
        if x.numel():
            check(y, exact_linear(x, weight, bias, residual), linear_ref(x, weight, bias, residual)[0])
            assert rms((stats.cpu() - exact_stats(y, tile.block_n)) / exact_stats(y, tile.block_n)) <= 1e-5
    x, sums = wide[..., :c].contiguous(), row_sums(weight)
    [launch] = collected(launch_linear, x, weight, bias, None, sums, tile=tile)  # finds its statistics itself
    assert not of_tma(launch)
    check(
        launch_linear(x, weight, bias, None, sums, tile=tile)[0],
        exact_linear(x, weight, bias, norm=True),
        linear_ref(x, weight, bias, None, sums)[0],
    )
    x, (weight, bias) = x[..., : c - 8].contiguous(), (t.to(device) for t in make_linear(c - 8, dim_out, dtype))
    assert not of_tma(*collected(launch_linear, x, weight, bias, tile=tile))
    check(launch_linear(x, weight, bias, tile=tile)[0], exact_linear(x, weight, bias), linear_ref(x, weight, bias)[0])


@needs_loops
@skip_before_hopper
@QUICK
@pytest.mark.parametrize(("device", "dtype"), HALF)
def test_tma_rows_do_not_feel_their_neighbours(device, dtype):
    """Neither NaN in another row of the tile, nor what stands in memory behind x and the weight."""
    for tile in TMA_TILES[device]:
        c, dim_out, rows = 2 * tile.block_k, tile.block_n + 8, tile.block_m + 3
        weight, bias = (t.to(device) for t in make_linear(c, dim_out, dtype))
        memory = torch.full((2 * (rows + dim_out), c), float("nan")).to(device, dtype)
        x, weight = memory[:rows].copy_(make_rows(rows, c)), memory[2 * rows :][:dim_out].copy_(weight)
        expected, _ = launch_linear(x.clone(), weight.clone(), bias, tile=tile)
        assert torch.isfinite(expected).all()
        assert torch.equal(launch_linear(x, weight, bias, tile=tile)[0], expected)
        x[1, 5] = float("nan")
        y, _ = launch_linear(x, weight, bias, tile=tile)
        assert y[1].isnan().all()
        y[1] = expected[1]
        assert torch.equal(y, expected)
