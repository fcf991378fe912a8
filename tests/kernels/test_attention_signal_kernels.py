"""Attention's launch that leaves a signal: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from attention_checks import on, poisoned
from attention_inputs import INF, make_bias, make_pair_bias, make_qkv
from dvit_kernels.attention import AttentionTile, launch_attention, launch_attention_with_signal
from kernel_helpers import EMULATED, EMULATED_FLOAT32, LARGE, QUICK, WHERE, check, collected, needs_loops, run_guarded
from token_reduction_checks import make_sizes

from dvit_infer.ops.attention import attention_with_signal
from dvit_infer.ops.attention_signal import SIGNALS, attention_with_signal_ref
from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.fallback import widened

pytestmark = needs_loops

ROWS = WHERE + EMULATED_FLOAT32 if WHERE == EMULATED else WHERE
OUTPUTS = ("out_ptr", "signal_ptr")

# B, M, N, H, D: one token, one query, several tiles of queries, two chunks of keys and blocks of them.
SHAPES = [
    (2, 1, 1, 1, 16),
    pytest.param(1, 65, 24, 3, 32, marks=QUICK),
    pytest.param(1, 17, 40, 5, 60, marks=LARGE),
    pytest.param(1, 18, 130, 2, 104, marks=LARGE),
    pytest.param(1, 17, 197, 1, 64, marks=LARGE),
    pytest.param(1, 20, 290, 1, 32, marks=LARGE),
]


def run(*given, **named) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the signal, of one launch."""
    [launch] = collected(launch_attention_with_signal, *given, **named)
    outputs = run_guarded([launch], OUTPUTS)
    return outputs["out_ptr"], outputs["signal_ptr"]


def check_both(got: tuple[torch.Tensor, torch.Tensor], given: tuple) -> None:
    given = tuple(t.cpu() if isinstance(t, torch.Tensor) else t for t in given)
    expected, plain = attention_with_signal_ref(*map(widened, given)), attention_with_signal_ref(*given)
    assert got[1].shape == expected[1].shape
    assert got[1].dtype == torch.float32
    for i in range(2):
        check(got[i], expected[i], plain[i])


@pytest.mark.parametrize("leaves", SIGNALS)
@pytest.mark.parametrize(("b", "m", "n", "heads", "head_dim"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_result_and_signal(device, dtype, b, m, n, heads, head_dim, leaves):
    qkv = poisoned(*on(device, *make_qkv(b, m, n, heads, head_dim, dtype)))
    for bias in (None, *poisoned(make_bias(b, n).to(device))):
        given = (*qkv, head_dim**-0.5, bias, leaves)
        got = run(*given)
        check_both(got, given)
        assert torch.equal(got[0], launch_attention(*given[:-1]))


@pytest.mark.parametrize("groups", [pytest.param(0, marks=LARGE), 2])
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_the_class_row_has_its_pair_bias(device, dtype, groups):
    qkv = on(device, *make_qkv(4, 20, 20, 2, 32, dtype))
    for bias in (None, make_bias(4, 20).to(device)):
        given = (*qkv, 0.2, bias, "class_attention", make_pair_bias(2, 20, 20, groups).to(device))
        check_both(run(*given), given)


@pytest.mark.slow
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_masked_keys_weigh_nothing_and_odd_tiles_change_nothing(device, dtype, online):
    """Also where all are masked; the signal does not depend on how many programs share the queries."""
    qkv = on(device, *make_qkv(3, 40, 40, 1, 32, dtype))
    bias = make_bias(3, 40)
    bias[1], bias[2, 5:] = -INF, -INF
    tiles = [AttentionTile(16, 16, num_stages=2)] if online else [AttentionTile(16, 32, 16, programs=i) for i in (1, 3)]
    for tile in tiles:
        for leaves in SIGNALS:
            given = (*qkv, 0.2, bias.to(device), leaves)
            got = run(*given, tile=tile)
            check_both(got, given)
        weights = run(*qkv, 0.2, bias.to(device), "class_attention", tile=tile)[1].cpu()
        assert (weights[1] == 0).all()
        assert (weights[2, :, 5:] == 0).all()


@pytest.mark.parametrize("tile", [None, pytest.param(AttentionTile(16, 16, num_stages=2), marks=LARGE)])
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_the_bias_may_be_the_logarithm_of_sizes(device, dtype, tile):
    """Up to every patch in one token, in a padded block of keys; also beside a pair bias."""
    qkv, sizes = on(device, *make_qkv(2, 20, 20, 2, 32, dtype)), make_sizes(2, 20).to(device)
    sizes[1, 3] = 1000.0
    for leaves in SIGNALS:
        for pair_bias in (None, make_pair_bias(2, 20, 20).to(device)):
            given = (*qkv, 0.2, sizes, leaves, pair_bias, True)
            got = run(*given, tile=tile)
            check_both(got, given)
            if dtype == torch.float32:
                logs = run(*qkv, 0.2, sizes.log(), leaves, pair_bias, tile=tile)
                torch.testing.assert_close(got, logs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_strided_keys(device, dtype):
    wide = make_qkv(4, 18, 18, 4, 48, dtype)[0].to(device)
    for x in (wide[::2, ::2, ::2, :32], wide[:2, :4, :, :20].transpose(1, 2), wide[:2, ..., ::2], wide[:2, ..., 1:33]):
        for leaves in SIGNALS:
            given = (x, x.flip(1), x, 0.2, None, leaves)
            check_both(run(*given), given)


def test_what_leaves_nothing_is_refused():
    q, k, v = make_qkv(1, 4, 4, 1, 32, torch.float32)
    for queries, leaves in ((q, "values"), (q[:, :0], "mean_keys")):
        with pytest.raises(ValueError, match=f"{leaves} of {queries.shape[1]} queries"):
            launch_attention_with_signal(queries, k, v, 0.2, None, leaves)


def test_no_images():
    q, k, v = make_qkv(0, 5, 5, 2, 32, torch.float32)
    for leaves, shape in zip(SIGNALS, ((0, 2, 5), (0, 5, 32)), strict=True):
        assert launch_attention_with_signal(q, k, v, 0.2, None, leaves)[1].shape == shape


@pytest.mark.interpreter
def test_the_op_goes_the_way_that_was_chosen(monkeypatch):
    q, k, v = make_qkv(2, 9, 9, 1, 32, torch.float16)
    kind = {"op": "attention with signal", "dtype": "float16", "size": 2, "queries": 9, "tokens": 9, "head_dim": 32}
    given = (q, k, v, 0.2, None, "class_attention")
    expected, plain = launch_attention_with_signal(*given), attention_with_signal_ref(*given)
    with using(Choices(({**kind, "by": "pytorch"},))):
        assert all(torch.equal(a, b) for a, b in zip(attention_with_signal(*given), plain, strict=True))
    monkeypatch.setattr("dvit_infer.ops.attention_signal.attention_with_signal_ref", None)
    with using(Choices()):
        assert all(torch.equal(a, b) for a, b in zip(attention_with_signal(*given), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [197, 97, 577])
@pytest.mark.parametrize("leaves", SIGNALS)
def test_sizes_of_models(leaves, n, dtype):
    qkv = poisoned(*on("cuda", *make_qkv(3, n, n, 12, 64, dtype)))
    given = (*qkv, 0.125, make_bias(3, n).cuda(), leaves)
    check_both(run(*given), given)
