"""The Triton launch of patch_embedding: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from dvit_kernels.patch_embedding import (
    BYTE_TILES,
    FLOAT32_IMAGE_TILES,
    TILES,
    launch_patch_embedding,
)
from kernel_helpers import QUICK, WHERE, collected, rms, run_guarded
from patch_embedding_inputs import MEAN, STD, convolved, make_images, make_weights

from dvit_infer.ops.patch_embedding import pack_patch_embedding, patch_embedding_ref

# B, channels, H, W, p, C, P: odd grids, tails of rows, columns and inner blocks, tiles across and within images, any
# number of prefix tokens, one image, one patch.
SHAPES = [
    pytest.param(3, 3, 32, 48, 16, 40, 1, marks=QUICK),
    (1, 3, 28, 42, 14, 64, 2),
    (3, 3, 24, 16, 8, 72, 0),
    (2, 5, 27, 90, 3, 16, 1),
    (70, 1, 7, 7, 7, 8, 2),
    (1, 16, 16, 8, 8, 130, 1),
]
NHWC = torch.channels_last


def packed_on(device: str, weights: tuple[torch.Tensor, ...], dtype: torch.dtype, *given: object) -> list[torch.Tensor]:
    return [t.to(device) for t in pack_patch_embedding(*weights, dtype, *given)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("b", "channels", "height", "width", "p", "c", "num_prefix"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_tokens(device, dtype, b, channels, height, width, p, c, num_prefix, channels_last):
    weights = make_weights(c, channels, p, num_prefix, (height // p) * (width // p))
    packed = packed_on(device, weights, dtype, None, None, channels_last)
    given = torch.float32 if channels_last else dtype
    images = make_images(b, channels, height, width, given).to(device)
    if channels_last:
        images = images.contiguous(memory_format=NHWC)
    launches = collected(launch_patch_embedding, images, *packed, p, channels_last)
    tokens = run_guarded(launches, ["out_ptr"])["out_ptr"]
    expected = convolved(images.double(), weights, torch.float64)
    assert tokens.shape == expected.shape
    assert tokens.dtype == dtype
    plain = patch_embedding_ref(images, *packed, p, channels_last)
    assert rms(tokens - expected) <= 2 * rms(plain - expected) + 1e-6
    assert torch.equal(tokens[:, :num_prefix], packed[1][:num_prefix].to(dtype).expand(b, -1, -1))


@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("b", "height", "width", "p"), [(3, 32, 48, 16), (1, 28, 42, 14), (2, 24, 16, 8)])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_bytes(device, dtype, b, height, width, p, channels_last):
    """Normalised in the weight: better than images normalised and rounded."""
    weights = make_weights(72, 3, p, 1, (height // p) * (width // p))
    packed = packed_on(device, weights, dtype, MEAN, STD, channels_last)
    images = make_images(b, 3, height, width).to(device)
    if channels_last:
        images = images.contiguous(memory_format=NHWC)
    launches = collected(launch_patch_embedding, images, *packed, p, channels_last)
    tokens = run_guarded(launches, ["out_ptr"])["out_ptr"]
    expected, plain = convolved(images, weights, torch.float64, True), convolved(images, weights, dtype, True)
    assert rms(tokens - expected) <= rms(plain - expected) + 1e-6
    assert rms(tokens - expected) <= 2 * rms(patch_embedding_ref(images, *packed, p, channels_last) - expected) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "tile"),
    [
        *((torch.uint8, tile) for tile in BYTE_TILES),
        *((torch.float32, tile) for tile in FLOAT32_IMAGE_TILES),
        *((None, tile) for tile in TILES),
    ],
)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_every_tile(device, dtype, given, tile, monkeypatch):
    """Those of large batches too, whose products are Hopper's; of bytes, float32 and the weight's dtype (None)."""
    if dtype == torch.float32 and device == "cuda":
        pytest.skip("its registers would spill")
    monkeypatch.setattr("dvit_kernels.patch_embedding._tile", lambda *given: tile)
    weights, images = make_weights(tile.block_n + 8, 3, 8, 1, 6), (tile.block_m // 6 + 2, 3, 24, 16)
    packed = packed_on(device, weights, dtype, *((MEAN, STD) if given == torch.uint8 else ()))
    images = make_images(*images, given or dtype).to(device)
    tokens = launch_patch_embedding(images, *packed, 8)
    expected = convolved(images, weights, torch.float64, given == torch.uint8)
    assert rms(tokens - expected) <= 2 * rms(patch_embedding_ref(images, *packed, 8) - expected) + 1e-6


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_every_byte_enters_exactly(device, dtype):
    """Patches of one pixel, a weight of one and an empty table give the byte less 128."""
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    weight, table = torch.ones(1, 1, dtype=dtype, device=device), torch.zeros(256, 1, device=device)
    tokens = launch_patch_embedding(images, weight, table, 1)
    assert tokens.flatten().tolist() == list(range(-128, 128))


@pytest.mark.slow
@pytest.mark.parametrize("given", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_any_strides(device, dtype, given):
    wide = make_images(4, 3, 40, 40, given).to(device)
    views = (
        wide[::2, :, :16, 8:32],
        wide[..., ::2][:, :, 4:20, :16],
        wide[:1, :, :16, :16].expand(3, -1, -1, -1),
        wide.transpose(2, 3)[..., :16, 1:25],
        wide.contiguous(memory_format=NHWC)[:, :, 3:19, 1:17],
        wide.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)[..., :16, :8],
        make_images(2, 6, 16, 8, given).to(device).contiguous(memory_format=NHWC)[:, ::2],
        make_images(2, 6, 16, 8, given).to(device).contiguous(memory_format=NHWC)[:, :3],
    )
    for images in views:
        weights = make_weights(16, 3, 8, 1, (images.shape[2] // 8) * (images.shape[3] // 8))
        for channels_last in (False, True):
            packed = packed_on(device, weights, dtype, None, None, channels_last)
            tokens = launch_patch_embedding(images, *packed, 8, channels_last)
            expected = launch_patch_embedding(images.contiguous(), *packed, 8, channels_last)
            assert torch.equal(tokens, expected)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_a_image_does_not_feel_its_batch(device, dtype):
    """Neither a NaN in its neighbour, with which it shares a tile, nor its place in the batch; nor a patch another."""
    images = make_images(4, 3, 16, 24, dtype).to(device)
    packed = packed_on(device, make_weights(16, 3, 8, 1, 6), dtype)
    expected = launch_patch_embedding(images, *packed, 8)
    images[1, 2, 8, 7] = float("nan")  # the first patch of the second row
    tokens = launch_patch_embedding(images, *packed, 8)
    assert tokens[1, 4].isnan().all()
    assert tokens.isnan().sum() == 16
    tokens[1, 4] = expected[1, 4]
    assert torch.equal(tokens, expected)
    for i in (0, 3):
        assert torch.equal(launch_patch_embedding(images[i : i + 1], *packed, 8), expected[i : i + 1])


def test_no_images():
    packed = packed_on("cpu", make_weights(16, 3, 8, 2, 4), torch.float32)
    assert launch_patch_embedding(torch.zeros(0, 3, 16, 16), *packed, 8).shape == (0, 6, 16)


@pytest.mark.parametrize(
    ("shape", "p", "weight", "table", "message"),
    [
        ((1, 3, 16, 20), 8, (16, 192), (9, 16), "patch_size 8"),
        ((1, 3, 16, 16), 0, (16, 192), (5, 16), "patch_size 0"),
        ((1, 3, 16, 16), 8, (16, 64), (5, 16), "weight"),
        ((1, 3, 16, 16), 8, (16, 192), (3, 16), "table"),
        ((1, 3, 16, 16), 8, (16, 192), (5, 8), "table"),
        ((1, 3, 2**15, 2**15), 8, (16, 192), (5, 16), "images"),
    ],
)
def test_what_does_not_fit_is_refused(shape, p, weight, table, message):
    images, weight, table = (torch.empty(size, device="meta") for size in (shape, weight, table))
    with pytest.raises(ValueError, match=f"launch_patch_embedding: {message}"):
        launch_patch_embedding(images, weight, table, p)


def test_strides_too_wide_for_the_kernel_cost_a_copy():
    near = torch.empty(2**20, 3, 16, 16, 2, dtype=torch.uint8, device="meta")[..., 0]
    far = torch.empty(1, 3, 2**14, 2**16, dtype=torch.uint8, device="meta")[..., ::1024, ::4096]
    weight, table = torch.empty(8, 192, device="meta"), torch.empty(5, 8, device="meta")
    for one, copied in ((near, False), (far, True)):
        [launch] = collected(launch_patch_embedding, one, weight, table, 8)
        assert (launch.arguments["images_ptr"].stride() == one.stride()) is not copied


@pytest.mark.gpu
@pytest.mark.parametrize("given", [torch.uint8, torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "channels", "size", "p", "c"),
    [(64, 3, 224, 16, 384), (1, 3, 224, 16, 768), (3, 3, 384, 16, 192), (40, 64, 112, 8, 384), (2, 3, 518, 14, 384)],
)
def test_the_op_on_cuda_runs_the_kernel(b, channels, size, p, c, dtype, given, monkeypatch):
    weights = make_weights(c, channels, p, 1, (size // p) ** 2)
    images = make_images(b, channels, size, size, given or dtype).cuda()
    normalise = given == torch.uint8 and channels == 3
    for channels_last in (False, True):
        packed = packed_on("cuda", weights, dtype, *((MEAN, STD) if normalise else (None, None)), channels_last)
        images = images.contiguous(memory_format=NHWC if channels_last else torch.contiguous_format)
        tokens = launch_patch_embedding(images, *packed, p, channels_last)
        expected = convolved(images if normalise else _centred(images), weights, torch.float64, normalise)
        plain = patch_embedding_ref(images, *packed, p, channels_last)
        assert rms(tokens - expected) <= 2 * rms(plain - expected) + 1e-6
        with monkeypatch.context() as patch:
            patch.setattr("dvit_infer.ops.patch_embedding.patch_embedding_ref", None)
            assert torch.equal(torch.ops.dvit.patch_embedding(images, *packed, p, channels_last), tokens)


def _centred(images: torch.Tensor) -> torch.Tensor:
    return images.double() - 128 if images.dtype == torch.uint8 else images.double()


@pytest.mark.gpu
def test_a_captured_graph_gives_the_eager_answer():
    packed = packed_on("cuda", make_weights(384, 3, 16, 1, 196), torch.bfloat16, MEAN, STD)
    images = make_images(3, 3, 224, 224).cuda()
    torch.ops.dvit.patch_embedding(images, *packed, 16)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = torch.ops.dvit.patch_embedding(images, *packed, 16)
    images.copy_(images.flip(0))
    graph.replay()
    assert torch.equal(tokens, torch.ops.dvit.patch_embedding(images, *packed, 16))
