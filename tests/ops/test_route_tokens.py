"""The ops route_tokens and routed_mlp: the order against a float64 ranking, each token's branch, registration."""

import pytest
import torch
from kernel_helpers import DTYPES, rms
from prune_tokens_checks import differ_only_at_the_cut, float64_scores
from prune_tokens_inputs import make_predictor, make_x
from routing_inputs import exact_routed, make_branches, make_map, make_order

from dvit_infer.ops.linear import linear_ref
from dvit_infer.ops.prune_tokens import pack_predictor
from dvit_infer.ops.route_tokens import branch_rows, order_of, order_tokens_ref, route_tokens
from dvit_infer.ops.routed_mlp import free_stats_block, routed_mlp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k"), [(3, 20, 14), (1, 1, 1), (2, 9, 9), (1, 49, 1)])
def test_order_is_that_of_a_float64_ranking(b, n, k, dtype):
    x, predictor = make_x(b, n, 0, 64, dtype), make_predictor(64)
    order = route_tokens(x, pack_predictor(predictor, dtype), k)
    assert order.dtype == torch.int64
    assert order.sort(dim=1).values.tolist() == [list(range(n))] * b
    assert all(row == sorted(row) for part in (order[:, :k], order[:, k:]) for row in part.tolist())
    expected, margin = float64_scores(x, 0, predictor)
    best = expected.sort(dim=1, descending=True, stable=True).indices
    assert differ_only_at_the_cut(order[:, :k], best[:, :k], expected, margin)


def test_ties_go_to_the_lower_position_and_nan_ranks_last():
    nan = float("nan")
    score = torch.tensor([[1.0, nan, 2.0, 1.0, -0.0, 0.0], [nan] * 6])
    assert order_tokens_ref(score, 2).tolist() == [[0, 2, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert order_tokens_ref(score, 5).tolist() == [[0, 2, 3, 4, 5, 1], [0, 1, 2, 3, 4, 5]]


def test_an_order_can_be_made_of_given_positions():
    assert order_of(torch.tensor([[1, 4], [0, 2]]), 5).tolist() == [[1, 4, 0, 2, 3], [0, 2, 1, 3, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "c", "k"), [(2, 49, 32, 34), (3, 5, 8, 5), (1, 1, 8, 1)])
def test_every_token_takes_its_branch_in_its_place(b, n, c, k, dtype):
    x, residual, order = make_map(b, n, c, dtype), make_map(b, n, c, dtype, seed=2), make_order(b, n, k)
    mlp, fast = make_branches(c, 3 * c, dtype)
    y, stats = routed_mlp(x, residual, order, k, mlp, fast, eps=1e-6)
    assert (y.shape, y.dtype, stats.numel()) == (x.shape, dtype, 0)
    assert y.is_contiguous()
    # Dense, each branch of every token, as the error of this dtype.
    hidden, _ = linear_ref(x, *mlp[:2], None, mlp[2], None, 1e-6, "gelu")
    slow, quick = linear_ref(hidden, *mlp[3:], residual)[0], linear_ref(x, *fast[:2], residual, fast[2], None, 1e-6)[0]
    chosen = torch.zeros(b, n, 1, dtype=torch.bool).scatter_(1, order[:, :k, None], True)
    exact = exact_routed(x, residual, order, k, mlp, fast, 1e-6)
    assert rms(y - exact) <= 2 * rms(torch.where(chosen, slow, quick) - exact) + 1e-6


def test_what_a_branch_adds_nothing_to_stays_bit_for_bit():
    """With weights of zero in one branch, its rows are those of the residual, and only they."""
    x, order, k = make_map(2, 20, 16), make_order(2, 20, 13), 13
    mlp, fast = make_branches(16, 32)
    for branch, rows in zip((mlp, fast), branch_rows(order, k), strict=True):
        nothing = [torch.zeros_like(t) for t in branch]
        y, _ = routed_mlp(x, x, order, k, *((nothing, fast) if branch is mlp else (mlp, nothing)))
        same = (y == x).flatten(0, 1).all(dim=1)
        assert same.nonzero().flatten().tolist() == sorted(rows.tolist())


def test_any_strides_and_the_inputs_stay():
    mlp, fast = make_branches(16, 32)
    wide, order = make_map(4, 18, 40), make_order(2, 9, 4)
    before = wide.clone()
    for x in (wide[::2, :9, :16], wide[:2, ::2, 3:19], wide[:2, :9, :32:2], wide.transpose(0, 1)[:2, :, :16]):
        o = order if x.shape[1] == 9 else make_order(2, 4, 3)
        expected, _ = routed_mlp(x.contiguous(), x.contiguous(), o, 3, mlp, fast)
        assert torch.equal(routed_mlp(x, x, o, 3, mlp, fast)[0], expected)
    assert torch.equal(wide, before)


def test_statistics_of_the_result():
    x, (mlp, fast) = make_map(2, 9, 16), make_branches(16, 32)
    y, stats = routed_mlp(x, x, make_order(2, 9, 4), 4, mlp, fast, stats_block=8)
    assert stats.shape == (18, 2, 2)
    torch.testing.assert_close(stats[..., 0], y.view(18, 2, 8).mean(dim=2))
    assert free_stats_block(x.device, x.dtype, 18, 16, 32) == 0  # PyTorch has none to give


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    x = make_x(2, 12, 0, 64, dtype).to(device)
    packed = [t.to(device) for t in pack_predictor(make_predictor(64), dtype)]
    torch.library.opcheck(torch.ops.dvit.route_tokens.default, (x, packed, 5, 1e-6))
    mlp, fast = ([t.to(device) for t in branch] for branch in make_branches(64, 96, dtype))
    for stats_block in (0, 32):
        call = (x, x, make_order(2, 12, 5).to(device), 5, mlp, fast, None, 1e-6, "gelu", stats_block)
        torch.library.opcheck(torch.ops.dvit.routed_mlp.default, call)


def test_schemas_are_the_published_ones():
    assert str(torch.ops.dvit.route_tokens.default._schema) == (
        "dvit::route_tokens(Tensor x, Tensor[] packed, int num_keep, float eps=1.0000000000000001e-05) -> Tensor"
    )
    assert str(torch.ops.dvit.routed_mlp.default._schema) == (
        "dvit::routed_mlp(Tensor x, Tensor residual, Tensor order, int num_keep, Tensor[] mlp, Tensor[] fast, "
        'Tensor? stats=None, float eps=1.0000000000000001e-05, str activation="gelu", int stats_block=0) -> '
        "(Tensor, Tensor)"
    )


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mlp, fast = make_branches(64, 96)
        for i, tensor in enumerate([*pack_predictor(make_predictor(64)), *mlp, *fast]):
            self.register_buffer(f"w{i}", tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = [*self.buffers()]
        order = torch.ops.dvit.route_tokens(x * 2, w[:10], 6)
        return torch.ops.dvit.routed_mlp(x, x, order, 6, w[10:15], w[15:])[0]


@pytest.mark.slow
def test_compile_and_export_give_the_eager_answer():
    block, x = Block(), make_x(3, 20, 0, 64)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (3, 2):
        torch.testing.assert_close(compiled(x[:batch]), expected[:batch])
    exported = torch.export.export(block, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    torch.testing.assert_close(exported.module()(x[:2]), expected[:2])


def test_backward_says_that_there_is_no_gradient():
    x, (mlp, fast) = make_map(1, 4, 8).requires_grad_(), make_branches(8, 16)
    with pytest.raises(RuntimeError, match="no gradient"):
        routed_mlp(x, x, make_order(1, 4, 2), 2, mlp, fast)[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_keep": 0}, "num_keep is 0, from 1 to 9"),
        ({"num_keep": 10}, "num_keep is 10, from 1 to 9"),
        ({"x": torch.zeros(9, 64)}, "x is"),
        ({"x": torch.zeros(1, 9, 64).double()}, "x is torch.float64"),
        ({"x": torch.zeros(1, 9, 64).half()}, "packed does not fit, x has 64 channels in torch.float16"),
        ({"packed": []}, "packed does not fit"),
    ],
)
def test_what_no_order_can_be_made_of_is_named(change, message):
    given = {"x": torch.zeros(1, 9, 64), "packed": pack_predictor(make_predictor(64)), "num_keep": 3} | change
    with pytest.raises(ValueError, match=message):
        route_tokens(**given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        route_tokens(**given)


MLP, FAST = make_branches(8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_keep": 0}, "num_keep is 0, from 1 to 9"),
        ({"num_keep": 10}, "num_keep is 10, from 1 to 9"),
        ({"x": torch.zeros(9, 8)}, "x is"),
        ({"x": torch.zeros(1, 9, 8).double()}, "x is torch.float64"),
        ({"residual": torch.zeros(1, 8, 8)}, "residual is"),
        ({"residual": torch.zeros(1, 9, 8).half()}, "residual is torch.float16"),
        ({"order": torch.zeros(1, 8, dtype=torch.int64)}, "order is"),
        ({"order": torch.zeros(1, 9, dtype=torch.int32)}, "order is torch.int32"),
        ({"order": torch.zeros(1, 9, dtype=torch.int64, device="meta")}, "order is .* on meta"),
        ({"mlp": MLP[:4]}, "mlp is"),
        ({"mlp": []}, "mlp is"),
        ({"mlp": [MLP[0].half(), *MLP[1:]]}, "mlp is torch.float16"),
        ({"mlp": [*MLP[:2], MLP[2].half(), *MLP[3:]]}, "mlp is"),
        ({"mlp": [*MLP[:3], MLP[0], MLP[4]]}, "mlp is"),
        ({"fast": [*FAST[:1], FAST[1].int(), FAST[2]]}, "fast is"),
        ({"stats": torch.zeros(9, 3, 2)}, "stats is"),
        ({"stats": torch.zeros(8, 1, 2)}, "stats is"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"stats_block": 3}, "stats_block 3"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, order = torch.zeros(1, 9, 8), torch.arange(9)[None]
    given = {"x": x, "residual": x, "order": order, "num_keep": 3, "mlp": MLP, "fast": FAST} | change
    with pytest.raises(ValueError, match=message):
        routed_mlp(**given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        routed_mlp(**given)
