"""The op linear: its reference against float64, bad input, the compiler."""

import inspect

import pytest
import torch
from linear_inputs import exact_linear, exact_stats, make_linear, make_rows

from dvit_infer.ops.linear import ACTIVATIONS, linear, linear_ref, row_sums


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True])
def test_the_reference(norm, activation):
    x, (weight, bias), residual = make_rows(2, 5, 48), make_linear(48, 64), make_rows(2, 5, 64)
    y, stats = linear(x, weight, bias, residual, row_sums(weight) if norm else None, None, 1e-6, activation, 32)
    expected = exact_linear(x, weight, bias, residual, norm, 1e-6, activation)
    assert (y - expected).abs().max() <= 1e-5
    torch.testing.assert_close(stats, exact_stats(y, 32).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", "silu", "gelu_poly", "quick_gelu"])
def test_the_reference_of_a_gate(activation):
    x, (weight, bias), residual = make_rows(2, 5, 48), make_linear(48, 128), make_rows(2, 5, 64)
    given = activation, 32, None, True
    y, stats = linear(x, weight, bias, residual, row_sums(weight), None, 1e-6, *given)
    expected = exact_linear(x, weight, bias, residual, True, 1e-6, activation, True)
    assert (y - expected).abs().max() <= 1e-5
    torch.testing.assert_close(stats, exact_stats(y, 32).float(), rtol=1e-5, atol=1e-5)


def test_result_dtype_and_no_statistics():
    x, (weight, bias) = make_rows(3, 48, dtype=torch.bfloat16), make_linear(48, 10, torch.bfloat16)
    y, stats = linear(x, weight, bias, out_dtype=torch.float32)
    assert (y.dtype, y.shape, stats.numel()) == (torch.float32, (3, 10), 0)
    assert linear(x, weight)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("x is", {"x": torch.zeros(3, 48, dtype=torch.int64)}),
        ("x is", {"x": torch.zeros(3, 0), "weight": torch.zeros(10, 0)}),
        ("stats is", {"stats": torch.zeros(3, 0, 2)}),
        ("weight is", {"weight": torch.zeros(10, 47)}),
        ("weight is", {"weight": torch.zeros(10, 48, dtype=torch.float16)}),
        ("bias is", {"bias": torch.zeros(48)}),
        ("weight_sum is", {"weight_sum": torch.zeros(1, 10)}),
        ("residual has", {"residual": torch.zeros(3, 48)}),
        ("stats is", {"stats": torch.zeros(3, 2)}),
        ("stats has", {"stats": torch.zeros(2, 1, 2)}),
        ("stats has", {"stats": torch.zeros(3, 5, 2)}),
        ("weight is on meta", {"weight": torch.zeros(10, 48, device="meta")}),
        ("activation 'relu'", {"activation": "relu"}),
        ("stats_block 3", {"stats_block": 3}),
        ("stats_block -5", {"stats_block": -5}),
        ("stats_block 10", {"stats_block": 10, "gated": True}),
        ("residual has", {"residual": torch.zeros(3, 10), "gated": True}),
        ("weight has 9 rows", {"weight": torch.zeros(9, 48), "gated": True}),
    ],
)
def test_bad_input(what, change):
    good = {"x": torch.zeros(3, 48), "weight": torch.zeros(10, 48)}
    with pytest.raises(ValueError, match=f"^linear: {what}"):
        linear(**(good | change))


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 48), (0, 48)])
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"activation": "gelu_tanh", "stats_block": 32},
        {"out_dtype": torch.float32},
        {"activation": "silu", "stats_block": 16, "gated": True},
    ],
    ids=["plain", "gelu-stats", "float32", "gated"],
)
def test_opcheck(shape, named):
    dtype = torch.bfloat16 if "out_dtype" in named else torch.float32
    x, (weight, bias) = make_rows(*shape, dtype=dtype), make_linear(48, 64, dtype)
    sums = row_sums(weight)
    torch.library.opcheck(torch.ops.dvit.linear.default, (x, weight, bias, None, sums), named)


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.linear.default._schema) == (
        "dvit::linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? weight_sum=None, "
        'Tensor? stats=None, float eps=1.0000000000000001e-05, str activation="none", int stats_block=0, '
        "ScalarType? out_dtype=None, bool gated=False) -> (Tensor, Tensor)"
    )


def test_the_function_has_the_name_and_the_arguments_of_the_reference():
    assert linear.__name__ == "linear"
    assert linear.__doc__ == linear_ref.__doc__
    assert inspect.signature(linear) == inspect.signature(linear_ref)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        weight, bias = make_linear(48, 48)
        self.weight, self.bias = torch.nn.Parameter(weight, False), torch.nn.Parameter(bias, False)

    def forward(self, x):
        y, stats = linear(x, self.weight, self.bias, x, stats_block=16)
        return linear(y, self.weight, None, None, row_sums(self.weight), stats, activation="gelu")[0]


def test_compile_and_export():
    layer, x = Layer(), make_rows(2, 5, 48)
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(exported.module()(make_rows(7, 5, 48)), layer(make_rows(7, 5, 48)))


def test_there_is_no_gradient():
    x, (weight, _) = make_rows(3, 48).requires_grad_(), make_linear(48, 10)
    with pytest.raises(RuntimeError, match="no gradient"):
        linear(x, weight)[0].sum().backward()
