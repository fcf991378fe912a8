"""What tests of merge_tokens and keep_tokens share: inputs, matches by brute force in float64, checks of results."""

import torch
from kernel_helpers import rms

from dvit_infer.ops.merge_tokens import average_rows_ref

MARGIN = 1e-5  # decisions that are closer than this in float64 may go either way


def make_tokens(b: int, tokens: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, tokens, c, generator=torch.Generator().manual_seed(seed + tokens)).to(dtype)


def make_sizes(b: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 9, (b, tokens), generator=torch.Generator().manual_seed(tokens)).float()


def make_attention(b: int, heads: int, tokens: int) -> torch.Tensor:
    return make_tokens(b, tokens, heads, seed=7).transpose(1, 2).softmax(dim=-1).contiguous()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def brute_force_rows(keys: torch.Tensor, merge: int, num_prefix: int) -> tuple[list[int], float]:
    """The output row of every token of an image (P+N, D), and the margin of the closest decision behind it."""
    keys, p, tokens = keys.double(), num_prefix, len(keys)
    unit = keys / keys.norm(dim=1, keepdim=True)
    evens, odds = ([i for i in range(p, tokens) if i % 2 == parity] for parity in (0, 1))
    margin, matches = float("inf"), []
    for i in evens:
        cosines = [float(unit[i] @ unit[j]) for j in odds]
        best = max(cosines)
        matches.append((best, i, odds[cosines.index(best)]))
        others = sorted(cosines)[:-1]
        margin = min([margin, *(best - other for other in others[-1:])])
    matches.sort(key=lambda match: -match[0])
    falling = [best for best, _, _ in matches]
    ordered = range(merge - 1, len(evens) - 1) if p == 0 else range(merge - 1, min(merge, len(evens) - 1))
    margin = min([margin, *(falling[i] - falling[i + 1] for i in ordered)])
    left = [i for _, i, _ in matches[merge:]]
    order = [*range(p), *(left if p == 0 else sorted(left)), *odds]
    rows = {token: row for row, token in enumerate(order)}
    rows |= {i: rows[j] for _, i, j in matches[:merge]}
    return [rows[i] for i in range(tokens)], margin


def check_rows(keys: torch.Tensor, rows: torch.Tensor, merge: int, num_prefix: int) -> None:
    """Rows equal those of brute force in float64 wherever no decision is close, which most are not."""
    compared = 0
    for image, found in zip(keys.cpu(), rows.tolist(), strict=True):
        expected, margin = brute_force_rows(image, merge, num_prefix)
        assert set(found) == set(range(keys.shape[1] - merge))
        if margin > MARGIN:
            assert found == expected
            compared += 1
    assert compared or not len(keys)


def check_averages(x, sizes, merged, merged_sizes, rows) -> None:
    """Averages are those of float64 but for their rounding; tokens alone in their rows are copies, bit by bit."""
    count = merged.shape[1]
    sizes = torch.ones(x.shape[:2]) if sizes is None else sizes
    expected, total = average_rows_ref(x.double(), sizes.double(), rows, count)
    plain, _ = average_rows_ref(x, sizes, rows, count)
    torch.testing.assert_close(merged_sizes.double(), total, rtol=1e-6, atol=0)
    assert rms(merged - expected) <= 2 * rms(plain - expected) + 1e-7
    for i, of_image in enumerate(rows):
        alone = [t for t, row in enumerate(of_image.tolist()) if (of_image == row).sum() == 1]
        assert torch.equal(bits(merged[i, of_image[alone]]), bits(x[i, alone]))


def check_kept(x, attention, num_keep, num_prefix, fuse, kept, index) -> None:
    """Kept tokens are the best in float64 but for close ones, rows are copies, the fused row is that of float64."""
    score = attention[..., num_prefix:].double().mean(dim=1)
    b, rows = len(x), num_prefix + num_keep
    assert kept.shape == (b, rows + fuse, x.shape[2])
    assert kept.dtype == x.dtype
    assert index.dtype == torch.int64
    assert all(row == sorted(set(row)) for row in index.tolist())
    cut = score.sort(dim=1, descending=True).values[:, num_keep - 1]
    expected = score.sort(dim=1, descending=True, stable=True).indices[:, :num_keep]
    for i in range(b):
        different = set(index[i].tolist()) ^ set(expected[i].tolist())
        assert all(abs(score[i, j] - cut[i]) < MARGIN / x.shape[1] for j in different)
        taken = [*range(num_prefix), *(index[i] + num_prefix).tolist()]
        assert torch.equal(bits(kept[i, :rows]), bits(x[i, taken]))
    if fuse:
        weight = score.scatter(1, index, 0.0)
        exact = (weight[..., None] * x[:, num_prefix:].double()).sum(dim=1)
        plain = exact.to(x.dtype)
        assert rms(kept[:, -1] - exact) <= 2 * rms(plain - exact) + 1e-6
