"""patch_embedding: images to tokens (Dosovitskiy et al. 2021), with the normalisation of uint8 images in the weight.

It multiplies patches by a matrix and adds a table that holds the rest: prefix tokens, bias, position embedding, and the
contribution of the images' mean. On CUDA it is one Triton launch (dvit_kernels/patch_embedding.py).
`torch.ops.dvit.patch_embedding` exists once this module is imported.
"""

from collections.abc import Sequence

import torch

from dvit_infer.ops.choices import DTYPES, runs_triton
from dvit_infer.ops.fallback import by_kernel, check_close, some_of, widened
from dvit_infer.ops.registration import register

OP = "dvit::patch_embedding"
_CENTRE = 128  # a byte minus this is exact in float16 and bfloat16


def pack_patch_embedding(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    prefix: torch.Tensor | None,
    pos_embed: torch.Tensor,
    dtype: torch.dtype,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = False,
) -> list[torch.Tensor]:
    """Pack a patch embedding's weights for the op.

    Args:
        weight: (C, channels, p, p), the kernel of a convolution with stride p.
        bias: (C,) or None.
        prefix: (1, P, C), the tokens before the patches; None: P is 0.
        pos_embed: (1, P+N, C), added to prefix and patch tokens.
        dtype: the dtype of product and tokens: float32, float16 or bfloat16.
        mean, std: (channels,) of images scaled to 0..1. If given: for uint8 images, which the op normalises; None: for
            normalised images in floating point.
        channels_last: element order (y, x, channel) within a patch instead of (channel, y, x): for images whose
            channel stride is 1.

    Returns:
        w (C, channels * p * p) in `dtype`, divided by 255 std if given, rounded once;
        table (P+N, C) float32: prefix + pos_embed, then bias + pos_embed + w (128 - 255 mean).

    Raises:
        ValueError: a shape or a dtype is invalid.
    """
    if dtype not in DTYPES:
        raise ValueError(f"pack_patch_embedding: dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        found = f"weight has shape {tuple(weight.shape)}"
        raise ValueError(f"pack_patch_embedding: {found}, (C, channels, p, p) is expected")
    c, channels = weight.shape[:2]
    if bias is not None and tuple(bias.shape) != (c,):
        raise ValueError(f"pack_patch_embedding: bias has shape {tuple(bias.shape)}, ({c},) is expected")
    if prefix is not None and (prefix.ndim != 3 or prefix.shape[0] != 1 or prefix.shape[2] != c):
        raise ValueError(f"pack_patch_embedding: prefix has shape {tuple(prefix.shape)}, (1, P, {c}) is expected")
    p = 0 if prefix is None else prefix.shape[1]
    if pos_embed.ndim != 3 or pos_embed.shape[0] != 1 or pos_embed.shape[1] <= p or pos_embed.shape[2] != c:
        found = f"pos_embed has shape {tuple(pos_embed.shape)}"
        raise ValueError(f"pack_patch_embedding: {found}, (1, {p}+N, {c}) is expected")
    if (mean is None) != (std is None):
        raise ValueError(f"pack_patch_embedding: {'std' if mean is None else 'mean'} is given, the other is not")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"pack_patch_embedding: {name} has {len(values)} values, {channels} are expected")
    if std is not None and not all(value > 0 for value in std):
        raise ValueError(f"pack_patch_embedding: std is {tuple(std)}, all above 0 are expected")

    # In double precision, so that folded weights are rounded once.
    table = pos_embed.detach()[0].double().clone()
    if prefix is not None:
        table[:p] += prefix.detach()[0].double()
    if bias is not None:
        table[p:] += bias.detach().double()
    w = weight.detach().double()
    if std is not None:
        w = w / (255 * w.new_tensor(std)[:, None, None])
    w = w.to(dtype)
    if mean is not None:  # with w as rounded, so that its rounding error scales with an image's distance from the mean
        table[p:] += (w.double().sum(dim=(2, 3)) * (_CENTRE - 255 * table.new_tensor(mean))).sum(dim=1)
    w = w.permute(0, 2, 3, 1) if channels_last else w
    return [w.reshape(c, -1).contiguous(), table.float()]


def patch_embedding_ref(
    images: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, patch_size: int, channels_last: bool = False
) -> torch.Tensor:
    """Cut images into patches, embed them, add positions, put the prefix tokens before.

    Args:
        images: (B, channels, H, W), any strides. uint8 images enter the product less 128: with `weight` and `table`
            packed with mean and std they are normalised. Those in float32, float16 or bfloat16 are normalised already
            and rounded to the weight's dtype.
        weight: (C, channels * p * p), as `pack_patch_embedding` returned it.
        table: (P+N, C) float32, as `pack_patch_embedding` returned it.
        patch_size: p, which divides H and W; N is H/p * W/p patches, row by row.
        channels_last: as the weight was packed.

    Returns:
        (B, P+N, C) in the weight's dtype: the first P rows of `table`; then patches times `weight`, summed in float32,
        plus the other rows.

    Raises:
        ValueError: a shape, a dtype or a device is invalid.
        RuntimeError: on backward.
    """
    b, channels, height, width = images.shape
    p = patch_size
    # Rounded to the weight's dtype, as for the product; it represents bytes exactly.
    wide = torch.promote_types(weight.dtype, torch.float32)
    pixels = images.to(wide) - _CENTRE if images.dtype == torch.uint8 else images.to(weight.dtype).to(wide)
    patches = pixels.reshape(b, channels, height // p, p, width // p, p)
    patches = patches.permute((0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5))
    n = (height // p) * (width // p)
    first = table.shape[0] - n
    tokens = patches.reshape(b, n, weight.shape[1]) @ weight.to(wide).t() + table[first:]
    return torch.cat([table[:first].expand(b, -1, -1), tokens], dim=1).to(weight.dtype)


def _check(
    images: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    patch_size: int,
    out: torch.Tensor | None = None,
) -> None:
    if images.ndim != 4 or images.dtype not in (torch.uint8, *DTYPES):
        found, dtypes = f"{images.dtype} of shape {tuple(images.shape)}", "uint8, float32, float16 or bfloat16"
        raise ValueError(f"patch_embedding: images is {found}; (B, channels, H, W) in {dtypes} is expected")
    _, channels, height, width = images.shape
    if patch_size < 1 or height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"patch_embedding: patch_size {patch_size} does not divide images of {height} x {width}")
    k = channels * patch_size * patch_size
    if weight.ndim != 2 or weight.shape[1] != k or weight.dtype not in DTYPES:
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"patch_embedding: weight is {found}; (C, {k}) in float32, float16 or bfloat16 is expected")
    n = (height // patch_size) * (width // patch_size)
    if table.ndim != 2 or table.shape[0] < n or table.shape[1] != weight.shape[0] or table.dtype != torch.float32:
        found = f"{table.dtype} of shape {tuple(table.shape)}"
        raise ValueError(f"patch_embedding: table is {found}; (P+{n}, {weight.shape[0]}) in float32 is expected")
    for name, tensor in (("weight", weight), ("table", table)):
        if tensor.device != images.device:
            raise ValueError(f"patch_embedding: {name} is on {tensor.device}, images on {images.device}")
    if out is None:
        return
    shape = images.shape[0], table.shape[0], weight.shape[0]
    if out.shape != shape or out.dtype != weight.dtype or not out.is_contiguous() or out.device != images.device:
        found = f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
        raise ValueError(f"patch_embedding: out is {found}; {shape} in {weight.dtype}, contiguous, is expected")


def backend_of(device: torch.device, channels: int, height: int, width: int) -> str:
    """Return the backend of the op for images of that size on a device: 'Triton' or 'PyTorch'."""
    if not runs_triton(device, "patch_embedding"):
        return "PyTorch"
    from dvit_kernels.patch_embedding import supports

    return "Triton" if supports(channels, height, width) else "PyTorch"


def _run(
    images: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    patch_size: int,
    channels_last: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the op, by the kernel or by PyTorch; write into `out` if given."""
    _check(images, weight, table, patch_size, out)

    def plain() -> torch.Tensor:
        tokens = patch_embedding_ref(images, weight, table, patch_size, channels_last)
        return tokens if out is None else out.copy_(tokens)

    _, channels, height, width = images.shape
    if backend_of(images.device, channels, height, width) == "PyTorch":
        return plain()

    def kernel() -> torch.Tensor:
        from dvit_kernels.patch_embedding import launch_patch_embedding  # here: Triton takes a while to import

        return launch_patch_embedding(images, weight, table, patch_size, channels_last, out)

    def fault(tokens: torch.Tensor) -> str | None:
        some = some_of(images)
        few = images[some], weight, table, patch_size, channels_last
        exact = patch_embedding_ref(images[some], widened(weight), widened(table), patch_size, channels_last)
        return check_close(tokens[some], patch_embedding_ref(*few), exact)

    return by_kernel("patch_embedding", images.device, kernel, plain, fault, (images, weight, patch_size))


def _fake(
    images: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, patch_size: int, channels_last: bool = False
) -> torch.Tensor:
    _check(images, weight, table, patch_size)
    return weight.new_empty(images.shape[0], table.shape[0], weight.shape[0])


patch_embedding = register(OP, patch_embedding_ref, _run, _fake, "Train with the reference model.")


def patch_embedding_into(
    out: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    patch_size: int,
    channels_last: bool = False,
) -> None:
    """Write the op's result into `out`, (B, P+N, C) in the weight's dtype, contiguous; else as `patch_embedding`.

    For captured forwards, which read `out` at a fixed address; it can be neither traced nor exported.
    """
    _run(images, weight, table, patch_size, channels_last, out)
