"""The Triton launch of attention with queries and keys that it normalises and rotates first."""

import pytest
import torch
from attention_checks import on, poisoned
from attention_inputs import make_bias, make_pair_bias, make_qkv, make_ragged
from dvit_kernels.attention import AttentionTile, Compared, launch_attention
from kernel_helpers import LARGE, QUICK, WHERE, collected, needs_loops, rms, run_guarded
from rotary_inputs import exact_rotary, make_norms, make_places, make_tables

from dvit_infer.ops.rotary_attention import rotary_attention_ref

pytestmark = needs_loops

# B, M, N, H, D, prefix tokens, rows of the tables, by head: a tile and a row; one query; several chunks; blocks of
# keys; heads whose halves fill no power of two, or fewer than 16 channels.
SHAPES = [
    pytest.param(2, 17, 17, 2, 64, 5, 12, False, marks=QUICK),
    pytest.param(1, 33, 33, 1, 48, 1, 40, False, marks=LARGE),
    (2, 1, 21, 1, 104, 0, 10, False),
    (1, 9, 9, 2, 16, 1, 8, True),
    pytest.param(1, 70, 70, 1, 64, 5, 65, False, marks=LARGE),
    pytest.param(1, 3, 300, 1, 64, 5, 295, False, marks=LARGE),
    pytest.param(1, 18, 40, 1, 72, 1, 39, True, marks=(QUICK, LARGE)),
]


def _check(given: tuple, compared: Compared, tile: AttentionTile | None = None) -> None:
    """Against float64: at most twice the error of plain PyTorch in the same dtype."""
    out = run_guarded(collected(launch_attention, *given, compared=compared, tile=tile), ["out_ptr"])["out_ptr"]
    expected = exact_rotary(*given, *compared)
    assert rms(out.cpu() - expected) <= 2 * rms(rotary_attention_ref(*given, *compared).cpu() - expected) + 1e-6


@pytest.mark.parametrize(("b", "m", "n", "heads", "head_dim", "prefix", "places", "by_head"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_heads_are_rotated_and_normalised(device, dtype, b, m, n, heads, head_dim, prefix, places, by_head):
    """In memory that is NaN around every input; tokens behind the tables and prefix tokens stay as they are."""
    given = (*poisoned(*on(device, *make_qkv(b, m, n, heads, head_dim, dtype))), head_dim**-0.5)
    tables = poisoned(*on(device, *make_tables(*([heads] * by_head), places, head_dim=head_dim)))
    [norms] = poisoned(make_norms(head_dim).to(device))
    positions = make_places(b, n - prefix, max(places, n - prefix)).to(device)
    [bias] = poisoned(make_bias(b, n).to(device))
    _check((*given, None), Compared(*tables, None, prefix))
    _check((*given, bias), Compared(*tables, positions, prefix, norms, 1e-5))
    _check((*given, None), Compared(norms=norms))


@pytest.mark.slow
@pytest.mark.parametrize(
    "tile", [AttentionTile(16, 16), AttentionTile(16, 16, 16), AttentionTile(32, 16, num_stages=2)]
)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_tiles_change_nothing(device, dtype, tile):
    if dtype == torch.float32 and device == "cuda" and tile.block_m > 16:
        pytest.skip("its registers would spill")
    given = (*poisoned(*on(device, *make_qkv(2, 40, 40, 1, 32, dtype))), 0.2, None)
    _check(given, Compared(*on(device, *make_tables(39, head_dim=32)), None, 1, make_norms(32).to(device)), tile)


def test_what_no_kernel_does_with_a_rotation_is_refused():
    turned = Compared(*make_tables(3, head_dim=32), None, 1)
    *ragged, ends = make_ragged([3, 1], 1, 32, torch.float32)
    dense = make_qkv(1, 4, 4, 1, 32, torch.float32)
    for call in ((*ragged, 0.2, None, ends, 3), (*dense, 0.2, None, None, 0, make_pair_bias(1, 4, 4))):
        with pytest.raises(ValueError, match="dense batches, without pair bias or signal"):
            launch_attention(*call, compared=turned)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "head_dim"), [(201, 201, 64), (1, 201, 64), (577, 577, 64), (261, 261, 128)])
def test_sizes_of_models(m, n, head_dim, dtype):
    given = (*poisoned(*on("cuda", *make_qkv(3, m, n, 2, head_dim, dtype))), head_dim**-0.5, None)
    tables, norms = on("cuda", *make_tables(n - 5, head_dim=head_dim)), make_norms(head_dim).cuda()
    positions = make_places(3, n - 5, n - 5).cuda()
    for compared in (Compared(*tables, None, 5), Compared(*tables, positions, 5, norms), Compared(norms=norms)):
        _check(given, compared)
