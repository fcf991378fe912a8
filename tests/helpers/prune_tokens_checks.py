"""Checks of prune_tokens, whatever runs it: the choice against a float64 ranking, rows bit by bit, any strides."""

import copy
from collections.abc import Callable

import torch

from dvit_infer.ops.prune_tokens import pack_predictor, score_tokens_ref


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def float64_scores(x, p, predictor) -> tuple[torch.Tensor, float]:
    """The scores in float64, and how far from the cut a token may stay or go: four of PyTorch's errors."""
    plain = score_tokens_ref(x[:, p:], pack_predictor(predictor, x.dtype), 1e-5)
    logits = copy.deepcopy(predictor).double()(x[:, p:].double())
    expected = logits[..., 0] - logits[..., 1]
    return expected, 4 * (plain - expected).abs().max().item() + 1e-6


def differ_only_at_the_cut(index, theirs, expected, margin) -> bool:
    """Whether every token that one choice alone keeps scores as the last one that stays does."""
    k = index.shape[1]
    cuts = expected.sort(dim=1, descending=True).values[:, k - 1]
    pairs = zip(index.tolist(), theirs.tolist(), strict=True)
    return all(abs(expected[i, j] - cuts[i]) <= margin for i, (a, b) in enumerate(pairs) for j in set(a) ^ set(b))


def check_against_float64(x, k, p, kept_x, index, predictor, margin: float | None = None) -> None:
    """Sets differ from the stable float64 ranking only at the cut; rows are those of the set, bit by bit."""
    expected, of_plain = float64_scores(x, p, predictor)
    margin = of_plain if margin is None else margin
    assert all(row == sorted(set(row)) for row in index.tolist())
    assert index.shape == (len(x), k)
    assert index.dtype == torch.int64
    assert differ_only_at_the_cut(
        index, expected.sort(dim=1, descending=True, stable=True).indices[:, :k], expected, margin
    )
    assert kept_x.dtype == x.dtype
    rows = torch.cat([torch.arange(p).expand(len(x), p), index + p], dim=1)
    assert torch.equal(bits(kept_x), bits(x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))))


def check_strides(run: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], wide: torch.Tensor) -> None:
    """Views of a (6, 41, 128) tensor with one prefix token give what their copies give."""
    views = (
        wide[::2, :, :64],
        wide[:, ::2, 64:],
        wide.transpose(0, 1)[:30, :, :64],
        wide[..., ::2],
        wide[:, :, 1:65],
        wide[:1, :, :64].expand(3, -1, -1),
        wide[:, :1, :64].expand(-1, 9, -1),
    )
    for x in views:
        kept_x, index = run(x)
        expected_x, expected = run(x.contiguous())
        assert torch.equal(index, expected)
        assert torch.equal(kept_x, expected_x)
        assert kept_x.is_contiguous()


def check_graph(run: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> None:
    """A captured graph gives the eager result for other tokens; nothing in it depends on timing."""
    run(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept_x, index = run(x)
    x.copy_(x.flip(1))
    graph.replay()
    expected_x, expected = run(x)
    assert torch.equal(index, expected)
    assert torch.equal(kept_x, expected_x)
