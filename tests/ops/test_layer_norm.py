"""The ops layer_norm and row_stats: against float64, registration, what does not fit."""

import pytest
import torch
from kernel_helpers import DTYPES, ONE_DTYPE, rms
from layer_norm_inputs import exact_norm, exact_stats, make_rows, make_vectors

from dvit_infer.ops.layer_norm import layer_norm, row_stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 1, 384), (7, 192), (64,), (2, 3, 2, 33), (0, 8), (2, 4, 2100)])
def test_against_float64(shape, dtype):
    x = make_rows(*shape).to(dtype)
    unit = torch.finfo(dtype).eps
    for weight, bias in make_vectors(shape[-1], dtype):
        y = layer_norm(x, weight, bias, 1e-6)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert y.is_contiguous()
        if x.numel():
            assert rms(y - exact_norm(x, weight, bias, 1e-6)) <= 2 * unit
    stats, expected = row_stats(x), exact_stats(x)
    assert stats.shape == (x.numel() // shape[-1], 1, 2)
    assert stats.dtype == torch.float32
    assert torch.allclose(stats.double(), expected, rtol=1e-5, atol=1e-6)


def test_defaults_are_those_of_torch():
    x = make_rows(4, 64) * 1e-3
    assert torch.equal(layer_norm(x), torch.nn.LayerNorm(64)(x).detach())
    assert torch.equal(torch.ops.dvit.layer_norm(x), layer_norm(x, eps=1e-5))


def test_strided_input_gives_the_same_as_its_copy():
    wide = make_rows(6, 10, 128)
    for x in (wide[::2, :, :64], wide.transpose(0, 1)[..., 3:60], wide[..., ::2], wide.transpose(1, 2), wide[:, 0]):
        y = layer_norm(x)
        assert torch.equal(y, layer_norm(x.contiguous()))
        assert y.is_contiguous()
        assert torch.equal(row_stats(x), row_stats(x.contiguous()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
def test_opcheck(dtype, device):
    wide = make_rows(4, 6, 96).to(device, dtype)
    for x in (wide, wide[:, 1], wide.transpose(0, 1)[..., :48], wide[..., ::2], wide[:0]):
        for weight, bias in make_vectors(x.shape[-1], dtype, str(device)):
            torch.library.opcheck(torch.ops.dvit.layer_norm.default, (x, weight, bias, 1e-5))
        torch.library.opcheck(torch.ops.dvit.row_stats.default, (x,))


def test_schemas_are_the_published_ones():
    assert str(torch.ops.dvit.layer_norm.default._schema) == (
        "dvit::layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1.0000000000000001e-05) -> Tensor"
    )
    assert str(torch.ops.dvit.row_stats.default._schema) == "dvit::row_stats(Tensor x) -> Tensor"


class Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        (_, (weight, bias), *_) = make_vectors(64, torch.float32)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.ops.dvit.layer_norm(x * 2, self.weight, self.bias)
        return x, torch.ops.dvit.row_stats(x)


def test_compile_and_export_give_the_eager_answer():
    norm, x = Norm(), make_rows(3, 20, 64)
    expected = norm(x)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(norm, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    for batch in (3, 2):
        for module in (compiled, exported.module()):
            y, stats = module(x[:batch])
            assert torch.equal(y, expected[0][:batch])
            assert torch.equal(stats, expected[1][: batch * 20])


def test_backward_says_that_there_is_no_gradient():
    x = make_rows(3, 64).requires_grad_()
    for y in (layer_norm(x), row_stats(x)):
        with pytest.raises(RuntimeError, match="no gradient"):
            y.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, "x is .*shape"),
        ({"x": torch.zeros(2, 0)}, r"x is .*\(2, 0\)"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(2, 32)}, r"weight is .*\(64,\)"),
        ({"weight": torch.zeros(1, 64)}, r"weight is .*\(1, 64\)"),
        ({"weight": torch.zeros(64, dtype=torch.int32)}, "weight is torch.int32"),
        ({"bias": torch.zeros(63)}, r"bias is .*\(63,\)"),
        ({"bias": torch.zeros(64, device="meta")}, "bias is on meta"),
        ({"eps": -1e-5}, "eps is -1e-05"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"x": torch.zeros(2, 64), "weight": torch.ones(64), "bias": torch.ones(64), "eps": 1e-5} | change
    with pytest.raises(ValueError, match=message):
        layer_norm(**arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        layer_norm(**arguments)


@pytest.mark.parametrize("x", [torch.zeros(()), torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, 0)])
def test_what_has_no_statistics_is_named(x):
    with pytest.raises(ValueError, match="row_stats: x is"):
        row_stats(x)
