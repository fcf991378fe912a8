"""The launches of the models, on tensors without memory, for `make aot` to compile."""

import functools

import torch
from dvit_kernels.activations import CHEAPEST_GELU
from dvit_kernels.attention import Compared, launch_attention, launch_attention_with_signal
from dvit_kernels.attention_signals import SIGNALS
from dvit_kernels.keep_tokens import launch_keep_tokens
from dvit_kernels.launch import Launch, collecting, programmatic_launches
from dvit_kernels.layer_norm import launch_layer_norm, launch_row_stats
from dvit_kernels.linear import LinearTile, default_stats_block, launch_linear
from dvit_kernels.linear_tma import PAIRED, PREFETCHING
from dvit_kernels.merge_tokens import launch_merge_tokens
from dvit_kernels.patch_embedding import launch_patch_embedding
from dvit_kernels.prune_tokens import launch_prune_tokens
from dvit_kernels.route_tokens import launch_route_tokens
from dvit_kernels.routed_mlp import launch_routed_mlp

# (C, (N, K) per stage): DeiT-T, DeiT-S and LV-ViT-S, LV-ViT-M, DeiT-B at 224 pixels; LV-ViT-S at 384.
STAGES_224 = ((196, 137), (137, 96), (96, 67))
MODELS = ((192, STAGES_224), (384, STAGES_224), (512, STAGES_224), (768, STAGES_224), (384, ((576, 403), (403, 282))))


def packed_predictor(c: int, dtype: torch.dtype) -> list[torch.Tensor]:
    half, quarter = c // 2, c // 4
    matrices = {0: (c, c), 3: (half, half), 4: (half, half), 6: (quarter, half)}
    vectors = {1: (c,), 2: (c,), 5: (half,), 7: (quarter,), 8: (quarter,), 9: (1,)}
    return [
        torch.empty(matrices[i], dtype=dtype, device="meta")
        if i in matrices
        else torch.empty(vectors[i], device="meta")
        for i in range(10)
    ]


def prune_tokens(batch: int, n: int, c: int, num_keep: int, dtype: torch.dtype) -> None:
    """Launch one pruning stage."""
    x = torch.empty(batch, n + 1, c, dtype=dtype, device="meta")
    launch_prune_tokens(x, packed_predictor(c, dtype), num_keep, 1, 1e-5)


def routing(batch: int, c: int, dtype: torch.dtype) -> None:
    """Launch a choice and a routed block of DynamicSwin and DynamicConvNeXt, with statistics of x and without."""
    empty = functools.partial(torch.empty, device="meta")
    x = empty(batch, 196, c, dtype=dtype)
    order = launch_route_tokens(x, packed_predictor(c, dtype), 137, 1e-5)
    block = default_stats_block(batch * 196, c, dtype)
    w1, w2, w = (empty(*shape, dtype=dtype) for shape in ((4 * c, c), (c, 4 * c), (c, c)))
    mlp, fast = [w1, w1[:, 0], empty(4 * c), w2, w2[:, 0]], [w, w[:, 0], empty(c)]
    for stats in (None, empty(batch * 196, c // block, 2)):
        launch_routed_mlp(x, x, order, 137, mlp, fast, stats, 1e-5, CHEAPEST_GELU[dtype], block)


def merge_tokens() -> None:
    """Launch merging in DeiT-S and ViT-B at 224 pixels, from the first tokens to the last; in ViT-B at 384."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    first = [(batch, 197, c, 16, bf16) for batch in (1, 256) for c in (384, 768)]
    others = [(256, 21, 768, 10, bf16), (256, 577, 768, 23, bf16), (256, 197, 768, 16, f16), (256, 197, 768, 16, f32)]
    for batch, tokens, c, merge, dtype in (*first, *others):
        x, keys = (
            torch.empty(batch, tokens, c, dtype=dtype, device="meta"),
            torch.empty(batch, tokens, 64, device="meta"),
        )
        for sizes in (None, torch.empty(batch, tokens, device="meta")):
            launch_merge_tokens(x, keys, sizes, merge, 1)
            if (batch, tokens, dtype) == (256, 197, bf16):
                launch_merge_tokens(
                    x, keys, sizes, merge, 1, torch.empty(batch * (tokens - merge), 1, 2, device="meta")
                )
    x = torch.empty(256, 196, 768, dtype=bf16, device="meta")
    launch_merge_tokens(x, torch.empty(256, 196, 64, device="meta"), None, 16, 0)


def keep_tokens() -> None:
    """Launch EViT's choice in DeiT-S and ViT-B at 224 pixels, after the first and the last one; in ViT-B at 384."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    first = [(batch, 197, c, 138, bf16) for batch in (1, 256) for c in (384, 768)]
    others = [
        (256, 97, 768, 67, bf16),
        (256, 577, 768, 403, bf16),
        (256, 197, 768, 138, f16),
        (256, 197, 768, 138, f32),
    ]
    for batch, tokens, c, num_keep, dtype in (*first, *others):
        x = torch.empty(batch, tokens, c, dtype=dtype, device="meta")
        attention = torch.empty(batch, c // 64, tokens, device="meta")
        launch_keep_tokens(x, attention, num_keep, 1, True)
        if (batch, tokens, dtype) == (256, 197, bf16):
            stats = torch.empty(batch * (num_keep + 2), c // 128, 2, device="meta")
            launch_keep_tokens(x, attention, num_keep, 1, True, stats)
    launch_keep_tokens(x, torch.empty(256, 12, 197, device="meta"), 138, 1, False)


def layer_norm() -> None:
    """Launch LayerNorm of every width, and row statistics for a folded one."""
    for c, dtype in (*((c, torch.bfloat16) for c in (192, 384, 512, 768)), (384, torch.float32)):
        x, vector = torch.empty(256, 197, c, dtype=dtype, device="meta"), torch.empty(c, dtype=dtype, device="meta")
        launch_layer_norm(x, vector, vector, 1e-6)
        launch_row_stats(x)


def linear(rows: int, c: int, hidden: int, dtype: torch.dtype) -> None:
    """Launch the linears of a block: qkv with and without statistics, proj, fc1, fc2."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def normalised(dim_out: int, with_stats: bool, activation: str = "none") -> None:
        given = empty(dim_out, c), empty(dim_out), None, empty(dim_out, dtype=torch.float32)
        stats = empty(rows, c // block, 2, dtype=torch.float32) if with_stats else None
        launch_linear(empty(rows, c), *given, stats, 1e-6, activation)

    def added(dim_in: int) -> None:
        launch_linear(empty(rows, dim_in), empty(c, dim_in), empty(c), empty(rows, c), stats_block=block)

    block = default_stats_block(rows, c, dtype)
    normalised(3 * c, True)
    normalised(3 * c, False)
    added(c)
    normalised(hidden, True, CHEAPEST_GELU[dtype])
    added(hidden)


def gated(rows: int, c: int, hidden: int, activation: str, dtype: torch.dtype) -> None:
    """Launch both linears of a gated MLP: DINOv2, DINOv3 and EVA02, whose fc2 normalises its input."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    block = default_stats_block(rows, c, dtype)
    given = empty(2 * hidden, c), empty(2 * hidden), None, empty(2 * hidden, dtype=torch.float32)
    for stats in (empty(rows, c // block, 2, dtype=torch.float32), None):
        launch_linear(empty(rows, c), *given, stats, 1e-6, activation, gated=True)
    given = empty(c, hidden), empty(c), empty(rows, c), empty(c, dtype=torch.float32)
    stats = empty(rows, 1, 2, dtype=torch.float32) if rows > 1024 else None
    launch_linear(empty(rows, hidden), *given, stats, 1e-6, stats_block=block)


def activations() -> None:
    """Launch fc1 of CLIP (SiLU, after folding) and So400m, and the MLP of attention pooling, one row an image."""
    for rows, c, hidden, activation in ((256 * 197, 768, 3072, "silu"), (256 * 196, 1152, 4304, "gelu_tanh")):
        x, weight = (torch.empty(n, c, dtype=torch.bfloat16, device="meta") for n in (rows, hidden))
        sums, stats = torch.empty(hidden, device="meta"), torch.empty(rows, c // 128, 2, device="meta")
        launch_linear(x, weight, weight[:, 0], None, sums, stats, 1e-6, activation)
    for activation in ("gelu_tanh", "quick_gelu"):
        launch_linear(
            *(torch.empty(n, 1152, dtype=torch.bfloat16, device="meta") for n in (256, 4304)),
            None,
            activation=activation,
        )


def linear_tma(rows: int, c: int, hidden: int) -> None:
    """Launch the linears of a block by TMA, for each variant of its kernel, in tiles that fit in registers."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def normalised(dim_out: int, activation: str, tile: LinearTile) -> None:
        given = empty(dim_out, c), empty(dim_out), None, empty(dim_out, dtype=torch.float32)
        stats = empty(rows, c // 128, 2, dtype=torch.float32)
        launch_linear(empty(rows, c), *given, stats, 1e-6, activation, tile=tile)

    def added(tile: LinearTile) -> None:
        given = empty(rows, hidden), empty(c, hidden), empty(c), empty(rows, c)
        launch_linear(*given, stats_block=tile.block_n, tile=tile)

    normalised(3 * c, "none", LinearTile(128, 128, 64, 8, 4, PREFETCHING))
    normalised(hidden, "gelu_tanh", LinearTile(128, 128, 64, 8, 3, PAIRED))
    added(LinearTile(128, 128, 64, 8, 4, PREFETCHING))
    added(LinearTile(128, 128, 64, 8, 2, PAIRED, 128))


def candidates() -> None:
    """Launch what was not measured yet: GELU with the GPU's tanh instruction."""
    x, weight = (torch.empty(size, 384, dtype=torch.bfloat16, device="meta") for size in (256 * 197, 1536))
    stats, sums = torch.empty(256 * 197, 3, 2, device="meta"), torch.empty(1536, device="meta")
    launch_linear(x, weight, weight[:, 0], None, sums, stats, 1e-6, "gelu_tanh_approx")


def class_row(batch: int, c: int, dtype: torch.dtype) -> None:
    """Launch the linears of the class token alone: its queries, and the head."""
    x = torch.empty(batch, 68, c, dtype=dtype, device="meta")[:, :1]
    for dim_out, out_dtype in ((c, None), (1000, torch.float32)):
        weight, sums = torch.empty(dim_out, c, dtype=dtype, device="meta"), torch.empty(dim_out, device="meta")
        bias = torch.empty(dim_out, dtype=dtype, device="meta")
        launch_linear(x, weight, bias, None, sums, None, 1e-6, out_dtype=out_dtype)


def apart(batch: int, c: int, dtype: torch.dtype) -> None:
    """Launch linears whose rows, in x or the residual, are not adjacent: prefix rows, an auxiliary head, by TMA."""
    x = torch.empty(batch, 69, c, dtype=dtype, device="meta")
    block = default_stats_block(2 * batch, c, dtype)
    for rows in (1, 2):
        weight, some = torch.empty(c, c, dtype=dtype, device="meta"), x[:, :rows]
        done = torch.empty(batch, rows, c, dtype=dtype, device="meta")
        launch_linear(done, weight, weight[:, 0], some, stats_block=block)
        launch_linear(some, weight, weight[:, 0], None, torch.empty(c, device="meta"))
    weight = torch.empty(1000, c, dtype=dtype, device="meta")
    sums = torch.empty(1000, device="meta")
    launch_linear(x[:, 2:], weight, weight[:, 0], None, sums, None, 1e-6, out_dtype=torch.float32)
    for tile in (LinearTile(128, 128, 64, 8, 3, PREFETCHING), LinearTile(128, 128, 64, 8, 2, PAIRED, 128)):
        weight = torch.empty(c, 4 * c, dtype=dtype, device="meta")
        hidden = torch.empty(batch, 67, 4 * c, dtype=dtype, device="meta")
        launch_linear(hidden, weight, weight[:, 0], x[:, 2:], stats_block=128, tile=tile)


def patch_embedding() -> None:
    """Launch 224-pixel images with patches of 16, in every dtype; LV-ViT's stem, with 64 channels at half that size."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    several = [(256, c, given, bf16) for c in (192, 384, 768) for given in (bf16, torch.uint8)]
    few = [(1, 384, given, bf16) for given in (bf16, torch.uint8)]
    for batch, c, given, dtype in [*several, *few, (256, 384, f32, bf16), (256, 384, f16, f16), (256, 384, f32, f32)]:
        images = torch.empty(batch, 3, 224, 224, dtype=given, device="meta")
        weight, table = torch.empty(c, 768, dtype=dtype, device="meta"), torch.empty(197, c, device="meta")
        launch_patch_embedding(images, weight, table, 16, False)
    stem = torch.empty(256, 64, 112, 112, dtype=bf16, device="meta").contiguous(memory_format=torch.channels_last)
    weight, table = torch.empty(384, 4096, dtype=bf16, device="meta"), torch.empty(197, 384, device="meta")
    launch_patch_embedding(stem, weight, table, 8, True)


def attention() -> None:
    """Launch every length of the models, the class token, other head sizes and dtypes, masked keys, ragged batches."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    empty = functools.partial(torch.empty, device="meta")
    of_models = [(n, n, 64, bf16) for n in (197, 138, 97, 68, 577, 1025)] + [(1, n, 64, bf16) for n in (197, 68)]
    other_heads = [(197, 197, d, bf16) for d in (32, 48, 60, 72, 80, 88, 96, 104, 128)] + [(577, 577, 128, bf16)]
    other_dtypes = [(197, 197, 64, f16), (197, 197, 64, f32), (197, 197, 128, f32)]
    for m, n, head_dim, dtype in (*of_models, *other_heads, *other_dtypes):
        q, k, v = empty(256, n, 3, 6, head_dim, dtype=dtype).unbind(2)
        launch_attention(q[:, :m], k, v, 0.125)
    qkv = empty(256, 197, 3, 6, 64, dtype=bf16)
    launch_attention(*qkv.unbind(2), 0.125, empty(256, 197))
    # Windows of Swin, with masks and without; relative positions of BEiT and MViT; a bias per key as well.
    windows = [(64, 49, 49, 32, bf16), (1, 49, 49, 32, bf16), (1, 49, 49, 32, f16), (1, 49, 49, 32, f32)]
    pairs = [*windows, (16, 144, 144, 32, bf16), *((1, n, n, 64, bf16) for n in (64, 197, 577)), (1, 1, 197, 64, bf16)]
    for groups, m, n, head_dim, dtype in (*pairs, (256, 784, 196, 96, bf16), (1, 577, 577, 128, bf16)):
        q, (k, v) = empty(256, m, 6, head_dim, dtype=dtype), empty(256, n, 2, 6, head_dim, dtype=dtype).unbind(2)
        pair_bias = empty(groups, 6, m, n)
        launch_attention(q, k, v, 0.125, pair_bias=pair_bias)
        launch_attention(q, k, v, 0.125, empty(256, n), pair_bias=pair_bias)
    ends = empty(257, dtype=torch.int32)
    launch_attention(*qkv.flatten(0, 1).unbind(1), 0.125, None, ends, 197)


def rotary_attention() -> None:
    """Launch rotated heads (DINOv3, EVA02), with positions after tokens were dropped; normalised ones; class tokens."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    empty = functools.partial(torch.empty, device="meta")
    half = [(201, 201, 64, bf16), (577, 577, 64, bf16), (201, 201, 64, f16), (1, 201, 64, bf16)]
    others = [*((261, 261, d, bf16) for d in (72, 80, 128)), *((201, 201, d, f32) for d in (64, 128))]
    for m, n, head_dim, dtype in (*half, *others):
        q, k, v = empty(256, n, 3, 6, head_dim, dtype=dtype).unbind(2)
        table, norms = empty(n - 5, head_dim), empty(2, 2, head_dim)
        turns, positions = Compared(table, table, None, 5), empty(256, n - 5, dtype=torch.int64)
        launch_attention(q[:, :m], k, v, 0.125, compared=turns)
        launch_attention(q[:, :m], k, v, 0.125, compared=turns._replace(norms=norms))
        launch_attention(q[:, :m], k, v, 0.125, compared=Compared(norms=norms))
        if n < 577:
            launch_attention(q[:, :m], k, v, 0.125, compared=turns._replace(positions=positions))
        if head_dim == 64:
            by_head = Compared(empty(6, n - 5, 64), empty(6, n - 5, 64), None, 5)
            launch_attention(q[:, :m], k, v, 0.125, empty(256, n), compared=by_head)  # merged tokens' sizes


def attention_with_signals() -> None:
    """Launch attention that leaves a signal: DeiT-S and ViT-B at 224 and 384 pixels, and after reduction."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    empty = functools.partial(torch.empty, device="meta")
    sizes = [(256, n, heads, bf16) for heads in (6, 12) for n in (197, 97, 577)]
    for batch, n, heads, dtype in (*sizes, (1, 197, 12, bf16), (256, 197, 12, f16), (256, 197, 12, f32)):
        q, k, v = empty(batch, n, 3, heads, 64, dtype=dtype).unbind(2)
        for leaves in SIGNALS:
            for bias in (None, empty(batch, n)):
                launch_attention_with_signal(q, k, v, 0.125, bias, leaves)
        launch_attention_with_signal(q, k, v, 0.125, bias, "mean_keys", log_bias=True)  # of merged tokens' sizes


def launches() -> list[Launch]:
    """Return the models' launches at batch 1 and 256 in bfloat16; for DeiT-S and DeiT-B also in float16 and float32."""
    with collecting() as found:
        for batch in (1, 256):
            for c, stages in MODELS:
                for n, num_keep in stages:
                    prune_tokens(batch, n, c, num_keep, torch.bfloat16)
            n, num_keep = STAGES_224[0]
            for dtype in (torch.float16, torch.float32):
                for c in (384, 768):
                    prune_tokens(batch, n, c, num_keep, dtype)
        merge_tokens()
        keep_tokens()
        layer_norm()
        for batch, n, c, ratio in ((256, 197, 384, 4), (1, 197, 384, 4), (256, 197, 768, 4), (1, 68, 768, 4)):
            linear(batch * n, c, ratio * c, torch.bfloat16)
        for c, ratio in ((192, 4), (512, 3)):
            linear(256 * 197, c, ratio * c, torch.bfloat16)
        linear(256 * 197, 384, 1536, torch.float16)
        linear(256 * 197, 384, 1536, torch.float32)
        for batch in (1, 256):
            gated(batch * 201, 384, 1536, "silu", torch.bfloat16)
        gated(256 * 257, 1536, 4096, "silu", torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            gated(256 * 197, 768, 2048, "silu", dtype)
        gated(256 * 197, 768, 2048, CHEAPEST_GELU[torch.bfloat16], torch.bfloat16)
        activations()
        linear_tma(256 * 197, 384, 1536)
        candidates()
        class_row(256, 384, torch.bfloat16)
        class_row(1, 384, torch.bfloat16)
        apart(256, 384, torch.bfloat16)
        patch_embedding()
        attention()
        rotary_attention()
        attention_with_signals()
        for batch, c in ((1, 384), (1, 512), (256, 384), (256, 512)):
            routing(batch, c, torch.bfloat16)
        routing(256, 384, torch.float16)
        routing(256, 384, torch.float32)
        with programmatic_launches(True):
            prune_tokens(1, 196, 384, 137, torch.bfloat16)
            x, keys = (
                torch.empty(1, 197, 384, dtype=torch.bfloat16, device="meta"),
                torch.empty(1, 197, 64, device="meta"),
            )
            launch_merge_tokens(x, keys, None, 16, 1)
            launch_keep_tokens(x, torch.empty(1, 6, 197, device="meta"), 138, 1, True)
            linear(197, 384, 1536, torch.bfloat16)
            routing(1, 384, torch.bfloat16)
            qkv = torch.empty(1, 197, 3, 6, 64, dtype=torch.bfloat16, device="meta")
            launch_attention(*qkv.unbind(2), 0.125)
            gated(201, 384, 1536, "silu", torch.bfloat16)
    return found
