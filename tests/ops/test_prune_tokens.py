"""The op: selection against a stable float64 ranking, rows bit-equal, ties, odd values, registration."""

import pytest
import torch
from kernel_helpers import DTYPES, ONE_DTYPE
from prune_tokens_checks import check_against_float64, check_strides, float64_scores
from prune_tokens_inputs import make_predictor, make_x

import dvit_infer as dvit
from dvit_infer.ops.prune_tokens import gather_tokens_ref, score_tokens_ref, select_tokens_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "n", "p", "dim", "k"),
    [
        (3, 196, 1, 384, 137),
        (2, 137, 1, 192, 96),
        (2, 49, 0, 64, 49),
        (1, 1, 1, 64, 1),
        (5, 33, 2, 96, 7),
        (2, 60, 5, 256, 1),
    ],
)
def test_kept_sets_equal_a_stable_float64_ranking(b, n, p, dim, k, dtype):
    predictor, x = make_predictor(dim), make_x(b, n, p, dim, dtype)
    kept_x, index = dvit.prune_tokens(x, predictor, k, p)
    score = float64_scores(x, p, predictor)[0]
    # Stated margin: rounding of the scores, in units of their spread.
    margin = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    margin *= max(score.std().item() if n > 1 else 1, 1)
    check_against_float64(x, k, p, kept_x, index, predictor, margin)


def test_scores_equal_the_predictor_in_float64():
    predictor, x = make_predictor(128), make_x(4, 50, 1, 128)
    score = score_tokens_ref(x[:, 1:], dvit.pack_predictor(predictor), 1e-5)
    logits = predictor.double()(x[:, 1:].double())
    assert torch.allclose(score.double(), logits[..., 0] - logits[..., 1], rtol=0, atol=1e-5)


def test_eps_is_the_modules_own():
    predictor = make_predictor(64)
    predictor.in_conv[0].eps = 0.5
    x = make_x(2, 40, 1, 64) * 0.3
    by_module = dvit.prune_tokens(x, predictor, 11)[1]
    packed = dvit.pack_predictor(predictor)
    assert torch.equal(by_module, torch.ops.dvit.prune_tokens(x, packed, 11, 1, 0.5)[1])
    assert torch.equal(by_module, dvit.prune_tokens(x, packed, 11, eps=0.5)[1])
    assert not torch.equal(by_module, torch.ops.dvit.prune_tokens(x, packed, 11)[1])


def test_a_state_dict_packs_like_its_module():
    predictor, x = make_predictor(64), make_x(2, 30, 1, 64)
    assert torch.equal(dvit.prune_tokens(x, predictor.state_dict(), 9)[1], dvit.prune_tokens(x, predictor, 9)[1])


def test_selection_with_ties_zeros_infinities_and_nan():
    nan, inf = float("nan"), float("inf")
    score = torch.tensor([[0.0, -0.0, 1.0, nan, -inf, 1.0, 0.0, inf]])
    expected_order = [7, 2, 5, 0, 1, 6, 4, 3]
    for k in range(1, 9):
        assert select_tokens_ref(score, k)[0].tolist() == sorted(expected_order[:k])
    assert select_tokens_ref(torch.full((1, 6), nan), 4)[0].tolist() == [0, 1, 2, 3]
    assert select_tokens_ref(torch.full((1, 6), -0.0), 3)[0].tolist() == [0, 1, 2]


def test_equal_tokens_keep_the_first():
    predictor = make_predictor(64)
    x = make_x(1, 1, 1, 64)[:, :1].expand(2, 13, 64)
    assert dvit.prune_tokens(x, predictor, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_nan_token_goes_first_and_nothing_leaves_the_row():
    predictor, x = make_predictor(64), make_x(2, 20, 1, 64)
    x[0, 5] = float("nan")  # the mean half carries it to every score of image 0
    index = dvit.prune_tokens(x, predictor, 7)[1]
    assert ((index >= 0) & (index < 20)).all()
    alone = dvit.prune_tokens(x[1:], predictor, 7)[1]
    assert torch.equal(index[1:], alone)


def test_strided_input_gives_the_same_as_its_copy():
    predictor = make_predictor(64)
    wide = make_x(6, 40, 1, 128)
    check_strides(lambda x: dvit.prune_tokens(x, predictor, 3), wide)


def test_keeping_all_is_the_identity_and_a_copy():
    predictor, x = make_predictor(64), make_x(2, 10, 1, 64)
    kept_x, index = dvit.prune_tokens(x, predictor, 10)
    assert torch.equal(kept_x, x)
    assert index.tolist() == [list(range(10))] * 2
    assert kept_x.data_ptr() != x.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("p", [0, 1, 2, 5])
def test_opcheck(p, dtype, device):
    x = make_x(2, 12, p, 64, dtype).to(device)
    packed = [t.to(device) for t in dvit.pack_predictor(make_predictor(64), dtype)]
    for tokens in (x, x[:, :, ::1].transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(torch.ops.dvit.prune_tokens.default, (tokens, packed, 5, p, 1e-5))


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.prune_tokens.default._schema) == (
        "dvit::prune_tokens(Tensor x, Tensor[] packed, int num_keep, int num_prefix=1, "
        "float eps=1.0000000000000001e-05) -> (Tensor, Tensor)"
    )


class Stage(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i, tensor in enumerate(dvit.pack_predictor(make_predictor(64))):
            self.register_buffer(f"packed{i}", tensor)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.dvit.prune_tokens(x * 2, [*self.buffers()], 6)


def test_compile_and_export_give_the_eager_answer():
    stage, x = Stage(), make_x(3, 20, 1, 64)
    expected = stage(x)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    for batch in (3, 2):
        assert torch.equal(compiled(x[:batch])[1], expected[1][:batch])
    exported = torch.export.export(stage, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    assert torch.equal(exported.module()(x[:2])[1], expected[1][:2])


def test_backward_says_that_there_is_no_gradient():
    x = make_x(1, 8, 1, 64).requires_grad_()
    kept_x, _ = dvit.prune_tokens(x, make_predictor(64), 3)
    with pytest.raises(RuntimeError, match="no gradient"):
        kept_x.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_keep": 0}, "num_keep is 0"),
        ({"num_keep": 9}, "num_keep is 9"),
        ({"num_prefix": -1}, "num_prefix is -1"),
        ({"num_prefix": 9}, "num_keep"),
        ({"x": torch.zeros(9, 64)}, "of shape"),
        ({"x": torch.zeros(1, 9, 64, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(1, 9, 32)}, "32 channels"),
        ({"x": torch.zeros(1, 9, 64, dtype=torch.float16)}, "float16"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"x": torch.zeros(1, 9, 64), "packed": dvit.pack_predictor(make_predictor(64)), "num_keep": 3} | change
    with pytest.raises(ValueError, match=message):
        dvit.prune_tokens(**arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        dvit.prune_tokens(**arguments)


def test_packed_tensors_of_other_shapes_are_refused():
    packed = dvit.pack_predictor(make_predictor(64))
    for wrong in ([packed[0]] * 10, packed[:9], [torch.ones(())] * 10, [*packed[:9], packed[9].to("meta")]):
        with pytest.raises(ValueError, match="packed does not fit"):
            dvit.prune_tokens(torch.zeros(1, 9, 64), wrong, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asked", ["", "native"])
def test_packed_tensors_in_other_dtypes_are_refused(asked, dtype, monkeypatch):
    monkeypatch.setenv("DVIT_PRUNE", asked)  # before the native library is looked for: it need not be there
    packed, x = dvit.pack_predictor(make_predictor(64), dtype), torch.zeros(1, 9, 64, dtype=dtype)
    for i, expected in enumerate(packed):
        for other in {torch.float64, *DTYPES} - {expected.dtype}:
            wrong = [*packed[:i], expected.to(other), *packed[i + 1 :]]
            with pytest.raises(ValueError, match=f"packed does not fit, x has 64 channels in {dtype} on cpu"):
                dvit.prune_tokens(x, wrong, 3)


def test_packing_names_what_is_wrong():
    state = make_predictor(64).state_dict()
    with pytest.raises(ValueError, match=r"missing out_conv\.2\.bias"):
        dvit.pack_predictor({k: v for k, v in state.items() if k != "out_conv.2.bias"})
    with pytest.raises(ValueError, match=r"out_conv\.0\.weight has shape"):
        dvit.pack_predictor(state | {"out_conv.0.weight": torch.zeros(32, 32)})
    with pytest.raises(ValueError, match="int8"):
        dvit.pack_predictor(state, torch.int8)


def test_gather_takes_rows_bit_for_bit():
    x = make_x(2, 9, 2, 64)
    x[0, 4] = float("nan")
    index = torch.tensor([[0, 2, 8], [1, 2, 3]])
    out = gather_tokens_ref(x, index, 2)
    assert torch.equal(out[0].view(torch.int32), x[0, [0, 1, 2, 4, 10]].view(torch.int32))
