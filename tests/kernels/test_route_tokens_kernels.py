"""The Triton launches of route_tokens and routed_mlp: on a GPU if there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from dvit_kernels.linear import TILES, LinearTile, launch_linear
from dvit_kernels.route_tokens import launch_route_tokens
from dvit_kernels.routed_mlp import WIDE_TILE, launch_routed_mlp
from kernel_helpers import LARGE, QUICK, WHERE, check, collected, guarded, run_guarded
from linear_inputs import exact_stats
from prune_tokens_checks import check_graph, differ_only_at_the_cut, float64_scores
from prune_tokens_inputs import make_predictor, make_x
from routing_inputs import exact_routed, make_branches, make_map, make_order

from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.layer_norm import row_stats_ref
from dvit_infer.ops.prune_tokens import pack_predictor
from dvit_infer.ops.route_tokens import branch_rows, order_of, order_tokens_ref, route_tokens
from dvit_infer.ops.routed_mlp import routed_mlp, routed_mlp_ref

SCORING = ("hidden_ptr", "sums_ptr", "score_ptr", "order_ptr")
OUTPUTS = ("hidden_ptr", "y_ptr", "y_stats_ptr")
SMALL = LinearTile(16, 16, 32, 1, 2)


@pytest.mark.parametrize(
    ("b", "n", "c", "k"),
    [pytest.param(2, 49, 96, 34, marks=QUICK), (2, 9, 64, 9), pytest.param(2, 196, 64, 137, marks=LARGE)],
)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_order_is_that_of_a_float64_ranking(device, dtype, b, n, c, k):
    x, predictor = make_x(b, n, 0, c, dtype), make_predictor(c)
    packed = [t.to(device) for t in pack_predictor(predictor, dtype)]
    outputs = run_guarded(collected(launch_route_tokens, x.to(device), packed, k, 1e-5), SCORING)
    score, order = outputs["score_ptr"].cpu(), outputs["order_ptr"].cpu()
    assert torch.equal(order, order_of(order[:, :k], n))
    assert torch.equal(order, order_tokens_ref(score, k))
    expected, _ = float64_scores(x, 0, predictor)
    margin = 2 * (score - expected).abs().max().item()
    best = expected.sort(dim=1, descending=True, stable=True).indices
    assert differ_only_at_the_cut(order[:, :k], best[:, :k], expected, margin)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("n", [1, 33, 196, pytest.param(300, marks=LARGE)])
def test_order_of_any_scores(n, device):
    """Ties, zeros of both signs, infinities and NaN, by counting and by radix."""
    nan, inf = float("nan"), float("inf")
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, -nan])
    score = odd[torch.randint(len(odd), (3, n), generator=torch.Generator().manual_seed(n))]
    score[1], score[2] = nan, 0.5
    packed = [t.to(device) for t in pack_predictor(make_predictor(64))]
    for k in {1, (n + 1) // 2, n}:
        (*_, place), outputs, _ = guarded(
            collected(launch_route_tokens, torch.zeros(3, n, 64, device=device), packed, k, 1e-5), SCORING
        )
        outputs["score_ptr"].copy_(score)
        place.run()
        assert torch.equal(outputs["order_ptr"].cpu(), order_tokens_ref(score, k))


# B, N, C, H, K: tails of rows and columns in both branches, tiles across images, an empty branch, one token.
@pytest.mark.parametrize(
    ("b", "n", "c", "hidden", "k"),
    [
        pytest.param(2, 49, 96, 48, 34, marks=QUICK),
        (2, 9, 40, 72, 9),
        (3, 1, 16, 16, 1),
        (5, 7, 33, 65, 1),
        pytest.param(1, 196, 96, 192, 137, marks=LARGE),
    ],
)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_every_token_takes_its_branch_in_its_place(device, dtype, b, n, c, hidden, k):
    """With statistics of x and without, by the default tiles."""
    x, residual = (make_map(b, n, c, dtype, seed).to(device) for seed in (1, 2))
    order = make_order(b, n, k).to(device)
    mlp, fast = ([t.to(device) for t in branch] for branch in make_branches(c, hidden, dtype))
    exact = exact_routed(x, residual, order, k, mlp, fast, 1e-6)
    plain, _ = routed_mlp_ref(x, residual, order, k, mlp, fast, None, 1e-6)
    for stats in (None, row_stats_ref(x)):
        outputs = run_guarded(collected(launch_routed_mlp, x, residual, order, k, mlp, fast, stats, 1e-6), OUTPUTS[:2])
        check(outputs["y_ptr"], exact, plain)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_rows_are_those_of_linears_of_gathered_rows(device, dtype):
    """Bit by bit: routing only changes where rows come from and go to. Statistics are of what is stored."""
    b, n, c, k = 2, 11, 32, 6
    x, residual = (make_map(b, n, c, dtype, seed).to(device) for seed in (1, 2))
    order = make_order(b, n, k).to(device)
    mlp, fast = ([t.to(device) for t in branch] for branch in make_branches(c, 48, dtype))
    given = x, residual, order, k, mlp, fast, None, 1e-5, "gelu", 16, (SMALL, SMALL)
    outputs = run_guarded(collected(launch_routed_mlp, *given), OUTPUTS)
    y = outputs["y_ptr"].view(-1, c)
    flat, added = x.view(-1, c), residual.view(-1, c)
    chosen, others = branch_rows(order, k)
    rows, _ = launch_linear(flat[chosen], *mlp[:2], None, mlp[2], activation="gelu", tile=SMALL)
    assert torch.equal(y[chosen], launch_linear(rows, *mlp[3:], added[chosen], tile=SMALL)[0])
    assert torch.equal(y[others], launch_linear(flat[others], *fast[:2], added[others], fast[2], tile=SMALL)[0])
    expected = exact_stats(outputs["y_ptr"], 16)
    torch.testing.assert_close(outputs["y_stats_ptr"].cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_tiles_of_large_batches(device, dtype):
    """Asynchronous products: statistics come from a launch of their own, or from before."""
    x, order = make_map(2, 70, 160, dtype).to(device), make_order(2, 70, 45).to(device)
    mlp, fast = ([t.to(device) for t in branch] for branch in make_branches(160, 192, dtype))
    exact = exact_routed(x, x, order, 45, mlp, fast)
    plain, _ = routed_mlp_ref(x, x, order, 45, mlp, fast)
    for tile in (WIDE_TILE, TILES[0]):
        y, _ = launch_routed_mlp(x, x, order, 45, mlp, fast, tiles=(tile, tile))
        check(y, exact, plain)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_a_token_does_not_feel_the_others(device, dtype):
    x, order = make_map(2, 9, 32, dtype).to(device), make_order(2, 9, 5).to(device)
    mlp, fast = ([t.to(device) for t in branch] for branch in make_branches(32, 48, dtype))
    expected, _ = launch_routed_mlp(x, x, order, 5, mlp, fast)
    x[1, 4] = x[0, 2] = float("nan")
    y, _ = launch_routed_mlp(x, x, order, 5, mlp, fast)
    assert y.isnan().all(dim=2).nonzero().tolist() == [[0, 2], [1, 4]]
    there = ~y.isnan()
    assert torch.equal(y[there], expected[there])


def test_no_images():
    mlp, fast = make_branches(64, 96)
    x, packed = torch.zeros(0, 9, 64), pack_predictor(make_predictor(64))
    order = launch_route_tokens(x, packed, 3, 1e-5)
    assert order.shape == (0, 9)
    y, stats = launch_routed_mlp(x, x, order, 3, mlp, fast, stats_block=64)
    assert (y.shape, stats.shape) == ((0, 9, 64), (0, 1, 2))


def test_what_the_kernels_do_not_have_is_refused():
    (mlp, fast), packed = make_branches(64, 96), pack_predictor(make_predictor(64))
    for n, k in ((1025, 3), (9, 10), (9, 0)):
        with pytest.raises(ValueError, match=f"{k} of {n} tokens with 64 channels"):
            launch_route_tokens(torch.zeros(1, n, 64), packed, k, 1e-5)
    x, order = torch.zeros(1, 9, 64), torch.arange(9)[None]
    with pytest.raises(ValueError, match="stats_block 16"):
        launch_routed_mlp(x, x, order, 3, mlp, fast, stats_block=16)
    with pytest.raises(ValueError, match="TMA"):
        launch_routed_mlp(x, x, order, 3, mlp, fast, tiles=(SMALL, LinearTile(128, 128, 64, 8, 3, 1)))


@pytest.mark.interpreter
def test_the_ops_run_the_kernels_where_they_are_chosen(monkeypatch):
    x, order, (mlp, fast) = make_map(2, 9, 64), make_order(2, 9, 5), make_branches(64, 32)
    packed = pack_predictor(make_predictor(64))
    expected = launch_route_tokens(x, packed, 5, 1e-5), launch_routed_mlp(x, x, order, 5, mlp, fast)[0]
    for op in ("route_tokens", "routed_mlp"):
        monkeypatch.setattr(f"dvit_infer.ops.{op}.{op}_ref", None)
    with using(Choices(otherwise="triton")):
        assert torch.equal(route_tokens(x, packed, 5), expected[0])
        assert torch.equal(routed_mlp(x, x, order, 5, mlp, fast)[0], expected[1])
        y, stats = routed_mlp(x, x, order, 5, mlp, fast, stats_block=16)  # that of no tile
    assert torch.equal(y, expected[1])
    torch.testing.assert_close(stats.double(), exact_stats(y, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("b", "c", "k"), [(256, 384, 137), (256, 512, 58), (1, 384, 97), (3, 1024, 137)])
def test_sizes_of_models(b, c, k, dtype):
    x, packed = make_map(b, 196, c, dtype).cuda(), [t.cuda() for t in pack_predictor(make_predictor(c), dtype)]
    order = launch_route_tokens(x, packed, k, 1e-5)
    assert torch.equal(order, order_of(order[:, :k], 196))
    mlp, fast = ([t.cuda() for t in branch] for branch in make_branches(c, 4 * c, dtype))
    y, _ = launch_routed_mlp(x, x, order, k, mlp, fast)
    some = [0, b - 1]
    given = x[some], x[some], order[some], k, mlp, fast
    check(y[some], exact_routed(*given), routed_mlp_ref(*given)[0].cpu())
    assert torch.equal(launch_routed_mlp(x, x, order, k, mlp, fast)[0], y)


@pytest.mark.gpu
def test_a_captured_graph_gives_the_eager_answer():
    x, packed = make_x(3, 196, 0, 384, torch.bfloat16).cuda(), pack_predictor(make_predictor(384), torch.bfloat16)
    packed = [t.cuda() for t in packed]
    mlp, fast = ([t.cuda() for t in branch] for branch in make_branches(384, 1536, torch.bfloat16))

    def block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = route_tokens(x, packed, 137)
        return routed_mlp(x, x, order, 137, mlp, fast)[0], order

    check_graph(block, x)
