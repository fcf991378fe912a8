"""The Triton launches of prune_tokens: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from dvit_kernels.prune_tokens import launch_prune_tokens
from kernel_helpers import EMULATED, EMULATED_FLOAT32, LARGE, QUICK, WHERE, collected, guarded, rms, run_guarded
from prune_tokens_checks import check_against_float64, check_graph, check_strides, float64_scores
from prune_tokens_inputs import make_predictor, make_x

import dvit_infer as dvit
from dvit_infer.ops.prune_tokens import prune_tokens_ref, score_tokens_ref, select_tokens_ref

ROWS = WHERE + EMULATED_FLOAT32 if WHERE == EMULATED else WHERE
OUTPUTS = ("hidden_ptr", "sums_ptr", "score_ptr", "kept_ptr", "index_ptr")

# B, N, P, C, K: both selections, tiles across images, tails of rows and columns, one token, all kept.
SHAPES = [
    pytest.param(3, 50, 1, 64, 35, marks=QUICK),
    pytest.param(2, 196, 1, 96, 137, marks=LARGE),
    pytest.param(1, 137, 2, 384, 96, marks=LARGE),
    (2, 49, 0, 64, 49),
    pytest.param(70, 1, 1, 64, 1, marks=LARGE),
    (9, 3, 5, 96, 2),
    pytest.param(5, 33, 2, 160, 7, marks=LARGE),
    pytest.param(1, 300, 5, 64, 211, marks=LARGE),
]


def predictor_on(device: str, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [t.to(device) for t in dvit.pack_predictor(make_predictor(dim), dtype)]


@pytest.mark.parametrize(("b", "n", "p", "c", "k"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_scores_sets_and_rows(device, dtype, b, n, p, c, k):
    x, packed = make_x(b, n, p, c, dtype).to(device), predictor_on(device, c, dtype)
    outputs = run_guarded(collected(launch_prune_tokens, x, packed, k, p, 1e-5), OUTPUTS)
    score, index, kept_x = (outputs[name].cpu() for name in ("score_ptr", "index_ptr", "kept_ptr"))
    expected = float64_scores(x.cpu(), p, make_predictor(c))[0]
    plain = score_tokens_ref(x[:, p:], packed, 1e-5).cpu()
    assert rms(score - expected) <= 2 * rms(plain - expected) + 1e-6

    # The stated margin: a set may differ from the stable float64 ranking where scores are closer than their own error.
    margin = 2 * (score - expected).abs().max().item()
    check_against_float64(x.cpu(), k, p, kept_x, index, make_predictor(c), margin)
    assert torch.equal(index, select_tokens_ref(score, k))


@pytest.mark.parametrize(("device", "dtype"), EMULATED)
def test_tiles_of_large_batches(device, dtype):
    test_scores_sets_and_rows(device, dtype, 28, 196, 1, 384, 137)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, *(pytest.param(n, marks=LARGE) for n in (196, 256, 257, 576, 1024))])
def test_selection_of_any_scores(n, device):
    """Ties, zeros of both signs, infinities and NaN, by counting and by radix; no index leaves the row."""
    nan, inf = float("nan"), float("inf")
    generator = torch.Generator().manual_seed(n)
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, -nan, 1e-45, -1e-45])
    score = torch.stack(
        [
            torch.randn(n, generator=generator),
            odd[torch.randint(len(odd), (n,), generator=generator)],
            torch.randint(-2, 3, (n,), generator=generator).float(),
            torch.full((n,), nan),
            torch.full((n,), -0.0).index_fill(0, torch.arange(0, n, 2), 0.0),
            torch.full((n,), -inf),
        ]
    ).to(device)
    x = torch.arange(len(score) * n * 64, dtype=torch.float32, device=device).view(len(score), n, 64)
    for k in sorted({1, (n + 1) // 2, n}) if n <= 257 else [n // 3]:
        packed = predictor_on(device, 64, torch.float32)
        (*_, select), outputs, _ = guarded(collected(launch_prune_tokens, x, packed, k, 0, 1e-5), OUTPUTS)
        outputs["score_ptr"].copy_(score)
        select.run()
        expected = select_tokens_ref(score, k)
        assert torch.equal(outputs["index_ptr"], expected)
        assert torch.equal(outputs["kept_ptr"], x.gather(1, expected[..., None].expand(-1, -1, 64)))


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_any_strides_of_the_first_two_dimensions(device, dtype):
    packed, wide = predictor_on(device, 64, dtype), make_x(6, 40, 1, 128, dtype).to(device)
    check_strides(lambda x: launch_prune_tokens(x, packed, 3, 1, 1e-5), wide)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_a_image_does_not_feel_its_batch(device, dtype):
    """Neither a NaN in its neighbour, with which it shares a tile, nor its place in the batch."""
    x, packed = make_x(4, 20, 1, 64, dtype).to(device), predictor_on(device, 64, dtype)
    _, index = launch_prune_tokens(x, packed, 9, 1, 1e-5)
    x[1, 7] = float("nan")
    x[3, 0] = float("nan")  # a prefix row, which no score sees
    kept_x, with_nan = launch_prune_tokens(x, packed, 9, 1, 1e-5)
    assert torch.equal(with_nan[[0, 2, 3]], index[[0, 2, 3]])
    assert with_nan[1].tolist() == list(range(9))  # the mean half carries it to every score: all rank alike
    assert kept_x[3, 0].isnan().all()
    for i in (0, 2):
        assert torch.equal(launch_prune_tokens(x[i : i + 1], packed, 9, 1, 1e-5)[1], index[i : i + 1])


@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_tokens_far_from_zero(device, dtype):
    """The folded LayerNorm subtracts a mean that dwarfs the deviations; rounding counts mean/std times."""
    x, packed = (make_x(2, 40, 1, 64) + 50).to(device, dtype), predictor_on(device, 64, dtype)
    launches, outputs, _ = guarded(collected(launch_prune_tokens, x, packed, 20, 1, 1e-5), OUTPUTS)
    for launch in launches:
        launch.run()
    logits = make_predictor(64).double()(x[:, 1:].cpu().double())
    expected = logits[..., 0] - logits[..., 1]
    plain = score_tokens_ref(x[:, 1:], packed, 1e-5).cpu()
    amplified = 50 * torch.finfo(torch.float32).eps * 8  # mean/std, float32 products, their sums
    assert rms(outputs["score_ptr"].cpu() - expected) <= 2 * rms(plain - expected) + amplified


def test_no_images_and_no_prefix():
    packed = predictor_on("cpu", 64, torch.float32)
    kept_x, index = launch_prune_tokens(torch.zeros(0, 9, 64), packed, 4, 0, 1e-5)
    assert kept_x.shape == (0, 4, 64)
    assert index.shape == (0, 4)


@pytest.mark.parametrize(
    ("n", "c", "k", "p"),
    [(1025, 64, 3, 1), (9, 32, 3, 1), (9, 1056, 3, 1), (9, 80, 3, 1), (9, 64, 10, 1), (9, 64, 0, 1), (9, 64, 3, -1)],
)
def test_sizes_beyond_the_kernels_are_refused(n, c, k, p):
    packed = predictor_on("cpu", c, torch.float32)
    with pytest.raises(ValueError, match=f"{k} of {n} tokens with {c} channels behind {p}"):
        launch_prune_tokens(torch.zeros(1, n + p, c), packed, k, p, 1e-5)


def test_packed_weights_of_another_width_or_dtype_are_refused():
    x = torch.zeros(1, 9, 64)
    for packed in (predictor_on("cpu", 96, torch.float32), predictor_on("cpu", 64, torch.float16), []):
        with pytest.raises(ValueError, match="packed does not fit"):
            launch_prune_tokens(x, packed, 3, 1, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("b", "n", "c", "k"), [(256, 196, 384, 137), (3, 576, 768, 403), (2, 1024, 1024, 700)])
def test_the_op_on_cuda_runs_the_kernels(b, n, c, k, dtype, monkeypatch):
    x, packed = make_x(b, n, 1, c, dtype).cuda(), predictor_on("cuda", c, dtype)
    expected_x, expected = launch_prune_tokens(x, packed, k, 1, 1e-5)
    monkeypatch.setattr("dvit_infer.ops.prune_tokens.prune_tokens_ref", None)
    kept_x, index = torch.ops.dvit.prune_tokens(x, packed, k, 1, 1e-5)
    assert torch.equal(index, expected)  # and the same again: nothing in it depends on timing
    assert torch.equal(kept_x, expected_x)
    assert torch.equal(kept_x[:, 1:], x[:, 1:].gather(1, index[..., None].expand(-1, -1, c)))


@pytest.mark.gpu
def test_on_cuda_sizes_beyond_the_kernels_run_in_pytorch():
    x, packed = make_x(2, 9, 1, 48).cuda(), predictor_on("cuda", 48, torch.float32)
    kept_x, index = torch.ops.dvit.prune_tokens(x, packed, 3, 1, 1e-5)
    expected_x, expected = prune_tokens_ref(x, packed, 3, 1, 1e-5)
    assert torch.equal(index, expected)
    assert torch.equal(kept_x, expected_x)


@pytest.mark.gpu
def test_a_captured_graph_gives_the_eager_answer():
    x, packed = make_x(3, 196, 1, 384, torch.bfloat16).cuda(), predictor_on("cuda", 384, torch.bfloat16)
    check_graph(lambda x: torch.ops.dvit.prune_tokens(x, packed, 137, 1, 1e-5), x)
