"""The op patch_embedding and its packing: against a convolution in float64, registration, what does not fit."""

import pytest
import torch
from kernel_helpers import DTYPES, ONE_DTYPE, rms
from patch_embedding_inputs import MEAN, STD, convolved, make_images, make_weights

from dvit_infer.ops.patch_embedding import pack_patch_embedding, patch_embedding

# B, channels, H, W, p, C, P: odd grids, patches of every size, no or several prefix tokens, one image, one patch.
SHAPES = [
    (3, 3, 32, 48, 16, 40, 1),
    (1, 3, 28, 42, 14, 64, 2),
    (2, 3, 24, 16, 8, 72, 0),
    (2, 5, 9, 6, 3, 16, 1),
    (1, 1, 7, 7, 7, 8, 3),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "channels", "height", "width", "p", "c", "num_prefix"), SHAPES)
def test_against_a_convolution(b, channels, height, width, p, c, num_prefix, dtype, channels_last):
    weights = make_weights(c, channels, p, num_prefix, (height // p) * (width // p))
    packed = pack_patch_embedding(*weights, dtype, channels_last=channels_last)
    for given in (dtype, torch.float32, torch.bfloat16):
        images = make_images(b, channels, height, width, given)
        tokens = patch_embedding(images, *packed, p, channels_last)
        expected, plain = convolved(images, weights, torch.float64), convolved(images, weights, dtype)
        assert tokens.shape == expected.shape
        assert tokens.dtype == dtype
        assert tokens.is_contiguous()
        assert rms(tokens - expected) <= 2 * rms(plain - expected) + 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_normalised_in_the_weight(dtype, channels_last):
    """Better than images normalised and rounded: neither the bytes nor their mean are."""
    images, weights = make_images(3, 3, 64, 48), make_weights(64, 3, 16, 1, 12)
    packed = pack_patch_embedding(*weights, dtype, MEAN, STD, channels_last)
    tokens = patch_embedding(images, *packed, 16, channels_last)
    expected, plain = convolved(images, weights, torch.float64, True), convolved(images, weights, dtype, True)
    assert rms(tokens - expected) <= rms(plain - expected) + 1e-6


def test_a_image_of_the_mean_colour_has_the_table_alone():
    """To a byte's rounding, whatever the rounding of the weight."""
    weights = make_weights(32, 3, 16, 1, 4)
    images = torch.full((1, 3, 32, 32), 51, dtype=torch.uint8)
    packed = pack_patch_embedding(*weights, torch.bfloat16, (0.2,) * 3, STD)
    _, bias, prefix, pos_embed = weights
    expected = torch.cat([prefix, bias.expand(1, 4, -1)], dim=1) + pos_embed
    tokens = patch_embedding(images, packed[0].float(), packed[1], 16)
    assert torch.allclose(tokens, expected, rtol=0, atol=1e-5)


def test_packing_without_bias_and_prefix():
    weight, bias, _, pos_embed = make_weights(16, 3, 4, 0, 6)
    images = make_images(2, 3, 8, 12, torch.float32)
    packed = pack_patch_embedding(weight, None, None, pos_embed, torch.float32)
    none = (weight, torch.zeros_like(bias), torch.zeros(1, 0, 16), pos_embed)
    assert torch.allclose(patch_embedding(images, *packed, 4), convolved(images, none, torch.float32), atol=1e-5)
    assert packed[0].shape == (16, 48)
    assert [t.dtype for t in packed] == [torch.float32] * 2
    assert packed[1].data_ptr() != pos_embed.data_ptr()


def test_strided_images_give_the_same_as_their_copy():
    for dtype in (torch.uint8, torch.float32):
        wide = make_images(4, 3, 40, 40, dtype)
        packed = pack_patch_embedding(*make_weights(16, 3, 8, 1, 16), torch.float32)
        views = (
            wide[::2, :, :32, 8:],
            wide.contiguous(memory_format=torch.channels_last)[:, :, 4:36, :32],
            wide.transpose(2, 3)[..., :32, 1:33],
            wide[:1, :, :32, :32].expand(3, -1, -1, -1),
        )
        for images in views:
            assert torch.equal(patch_embedding(images, *packed, 8), patch_embedding(images.contiguous(), *packed, 8))


def test_no_images():
    packed = pack_patch_embedding(*make_weights(16, 3, 8, 2, 4), torch.float32)
    assert patch_embedding(torch.zeros(0, 3, 16, 16), *packed, 8).shape == (0, 6, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last, dtype, device):
    packed = pack_patch_embedding(*make_weights(32, 3, 8, 1, 6), dtype, channels_last=channels_last)
    packed = [t.to(device) for t in packed]
    for given in (torch.uint8, dtype):
        images = make_images(2, 3, 16, 24, given).to(device)
        for one in (images, images.contiguous(memory_format=torch.channels_last), images[:0]):
            torch.library.opcheck(torch.ops.dvit.patch_embedding.default, (one, *packed, 8, channels_last))


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.patch_embedding.default._schema) == (
        "dvit::patch_embedding(Tensor images, Tensor weight, Tensor table, int patch_size, bool channels_last=False)"
        " -> Tensor"
    )


class Embed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight, table = pack_patch_embedding(*make_weights(32, 3, 8, 1, 6), torch.float32, MEAN, STD)
        self.register_buffer("weight", weight)
        self.register_buffer("table", table)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.ops.dvit.patch_embedding(images, self.weight, self.table, 8) * 2


def test_compile_and_export_give_the_eager_answer():
    embed, images = Embed(), make_images(3, 3, 16, 24)
    expected = embed(images)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    batch_of_any_size = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(embed, (images,), dynamic_shapes=batch_of_any_size)
    for batch in (3, 2):
        for module in (compiled, exported.module()):
            assert torch.allclose(module(images[:batch]), expected[:batch], rtol=0, atol=1e-5)


def test_backward_says_that_there_is_no_gradient():
    packed = pack_patch_embedding(*make_weights(16, 3, 8, 1, 4), torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        patch_embedding(torch.zeros(1, 3, 16, 16, requires_grad=True), *packed, 8).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 16, 16)}, r"images is .*\(3, 16, 16\)"),
        ({"images": torch.zeros(1, 3, 16, 16, dtype=torch.int32)}, "images is torch.int32"),
        ({"images": torch.zeros(1, 3, 16, 20)}, "patch_size 8 does not divide images of 16 x 20"),
        ({"images": torch.zeros(1, 3, 0, 16)}, "patch_size 8 does not divide images of 0 x 16"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"images": torch.zeros(1, 4, 16, 16)}, r"weight is .*\(C, 256\)"),
        ({"patch_size": 4}, r"weight is .*\(C, 48\)"),
        ({"weight": torch.zeros(16, 192, dtype=torch.float64)}, "weight is torch.float64"),
        ({"weight": torch.zeros(8, 192)}, r"table is .*\(P\+4, 8\)"),
        ({"table": torch.zeros(3, 16)}, r"table is .*\(3, 16\)"),
        ({"table": torch.zeros(5, 16, dtype=torch.float16)}, "table is torch.float16"),
        ({"table": torch.zeros(5, 16, device="meta")}, "table is on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    weight, table = pack_patch_embedding(*make_weights(16, 3, 8, 1, 4), torch.float32)
    given = {"images": torch.zeros(1, 3, 16, 16), "weight": weight, "table": table, "patch_size": 8} | change
    with pytest.raises(ValueError, match=message):
        patch_embedding(**given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        patch_embedding(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.int8}, "int8"),
        ({"weight": torch.zeros(16, 192)}, r"weight has shape \(16, 192\)"),
        ({"weight": torch.zeros(16, 3, 8, 4)}, r"weight has shape \(16, 3, 8, 4\)"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\)"),
        ({"prefix": torch.zeros(1, 1, 8)}, r"prefix has shape \(1, 1, 8\)"),
        ({"prefix": torch.zeros(16)}, r"prefix has shape \(16,\)"),
        ({"pos_embed": torch.zeros(1, 1, 16)}, r"pos_embed has shape \(1, 1, 16\), \(1, 1\+N, 16\)"),
        ({"pos_embed": torch.zeros(5, 16)}, r"pos_embed has shape \(5, 16\)"),
        ({"mean": MEAN}, "mean is given"),
        ({"std": STD}, "std is given"),
        ({"mean": MEAN[:2], "std": STD}, "mean has 2 values, 3"),
        ({"mean": MEAN, "std": (1.0,)}, "std has 1 values, 3"),
        ({"mean": MEAN, "std": (1.0, 0.0, 1.0)}, r"std is \(1.0, 0.0, 1.0\)"),
    ],
)
def test_packing_names_what_is_wrong(change, message):
    names = ("weight", "bias", "prefix", "pos_embed", "dtype")
    given = dict(zip(names, (*make_weights(16, 3, 8, 1, 4), torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        pack_patch_embedding(**given)
