"""Compare layers with PyTorch's: patch embedding, fc1 with each GELU and in float8, the stem of LV-ViT."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from launches import copies, microseconds
from rows import Row
from torch.nn import functional as F


class Sizes(NamedTuple):
    """The sizes to measure; `DRY` is small enough for Triton's interpreter."""

    product: int = 8192
    copy_mib: float = 1024
    cache_mib: tuple[float, ...] = (8, 16, 24, 32, 40, 48, 64, 96, 256)
    programs: int = 132 * 8
    images: int = 256
    pixels: int = 224
    channels: tuple[int, int] = (384, 768)
    seconds: float = 1.0
    block: int = 4096


DRY = Sizes(64, 0.25, (0.01,), 2, 1, 32, (64, 128), 0.0, 1024)


def measured(part: Callable[[torch.device, Sizes], Iterator[Row]], device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Yield the rows of one of `PARTS`, with runtime "measured" as default."""
    for row in part(device, sizes):
        yield {"runtime": "measured", **row}


def patch_embedding(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Patch embedding of DeiT-S: the kernel from uint8 and bfloat16, and PyTorch's convolution with its epilogue."""
    from dvit_kernels.patch_embedding import launch_patch_embedding

    from dvit_infer.ops.patch_embedding import pack_patch_embedding

    c, size = sizes.channels[0], (sizes.images, 3, sizes.pixels, sizes.pixels)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = 1 + (sizes.pixels // 16) ** 2
    weight, bias = torch.randn(c, 3, 16, 16, device=device) * 0.03, torch.zeros(c, device=device)
    prefix, pos = torch.zeros(1, 1, c, device=device), torch.randn(1, tokens, c, device=device)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    count = copies(sizes.images * 3 * sizes.pixels**2, device)
    pixels = [torch.randint(0, 256, size, dtype=torch.uint8, device=device) for _ in range(count)]
    floats = [one.to(dtype) for one in pixels[:3]]
    by_uint8 = pack_patch_embedding(weight, bias, prefix, pos, dtype, mean, std)
    by_float = pack_patch_embedding(weight, bias, prefix, pos, dtype)
    half = [t.to(dtype) for t in (weight, bias, prefix, pos)]

    def plain(one: torch.Tensor) -> torch.Tensor:
        tokens = F.conv2d(one, half[0], half[1], stride=16).flatten(2).transpose(1, 2)
        return torch.cat([half[2].expand(len(one), -1, -1), tokens], dim=1) + half[3]

    candidates = {
        "uint8, kernel": [lambda one=one: launch_patch_embedding(one, *by_uint8, 16) for one in pixels],
        "bfloat16, kernel": [lambda one=one: launch_patch_embedding(one, *by_float, 16) for one in floats],
        "bfloat16, convolution": [lambda one=one: plain(one) for one in floats],
    }
    yield from _rows(candidates, device, sizes, 60, f"patch embedding, DeiT-S, {sizes.images} images")


def activations(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """fc1 of DeiT-S and -B, its LayerNorm folded, with each form of GELU behind it and with none."""
    from dvit_kernels.linear import default_tile, launch_linear

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, forms = _fc1_rows(sizes), ("none", "gelu", "gelu_poly", "gelu_tanh", "gelu_tanh_approx")
    for name, c in zip("SB", sizes.channels, strict=True):
        weight, bias = (torch.randn(4 * c, *k, device=device).to(dtype) * c**-0.5 for k in ((c,), ()))
        stats = torch.tensor([0.0, 64.0], device=device).repeat(rows, c // 64, 1)
        x = [torch.randn(rows, c, device=device).to(dtype) for _ in range(copies(10 * rows * c, device))]
        given = weight, bias, None, weight.float().sum(dim=1), stats, 1e-6
        tile = default_tile(rows, 4 * c, dtype)

        def calls(
            form: str, x: list[torch.Tensor] = x, given: Any = given, tile: Any = tile
        ) -> list[Callable[[], Any]]:
            return [lambda one=one: launch_linear(one, *given, form, tile=tile) for one in x]

        own = [form for form in forms if device.type == "cuda" or form != "gelu_tanh_approx"]
        candidates = {form: calls(form) for form in own}
        flops = 8 * rows * c**2
        for row in _rows(candidates, device, sizes, flops / 4e8, f"fc1, DeiT-{name}, {sizes.images} images"):
            yield {**row, **({"tflops": flops / row["us"] / 1e6} if "us" in row else {})}


def float8(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """fc1 of DeiT-S and -B by `torch._scaled_mm` beside bfloat16, to see whether float8 is worth while.

    Only the product is timed, of tensors already in float8, with one scale each.
    """
    if device.type == "cpu":
        return
    rows, one = _fc1_rows(sizes), torch.ones((), device=device)
    for name, c in zip("SB", sizes.channels, strict=True):
        x = [torch.randn(rows, c, device=device).bfloat16() for _ in range(copies(10 * rows * c, device))]
        weight = torch.randn(4 * c, c, device=device).bfloat16() * c**-0.5
        small = [t.to(torch.float8_e4m3fn) for t in x]
        small_weight = weight.to(torch.float8_e4m3fn)

        def scaled(t: torch.Tensor, w: torch.Tensor = small_weight) -> torch.Tensor:
            return torch._scaled_mm(t, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        candidates = {
            "bfloat16, cuBLAS": [lambda t=t, w=weight: F.linear(t, w) for t in x],
            "float8, torch._scaled_mm": [lambda t=t: scaled(t) for t in small],
        }
        flops = 8 * rows * c**2
        for row in _rows(candidates, device, sizes, flops / 6e8, f"fc1 alone, DeiT-{name}, {sizes.images} images"):
            yield {**row, **({"tflops": flops / row["us"] / 1e6} if "us" in row else {})}


def _fc1_rows(sizes: Sizes) -> int:
    return sizes.images * (1 + (sizes.pixels // 16) ** 2)


def stem(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """LV-ViT-S's four convolutions: channels last and not, without bias, with it, and fused with bias and ReLU.

    PyTorch adds the bias after cuDNN's convolution and then applies ReLU: two passes over the result that
    `torch.cudnn_convolution_relu` avoids.
    """
    shapes = ((3, 64, 7, 2), (64, 64, 3, 1), (64, 64, 3, 1), (64, sizes.channels[0], 8, 8))
    given = torch.randn(sizes.images, 3, sizes.pixels, sizes.pixels, device=device).bfloat16()
    weights = [torch.randn(o, i, k, k, device=device).bfloat16() * 0.05 for i, o, k, _ in shapes]
    biases = [torch.randn(o, device=device).bfloat16() * 0.05 for _, o, _, _ in shapes]

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, stride: int, padding: int) -> torch.Tensor:
        return F.conv2d(x, w, b, stride, padding).relu_()

    def fused(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
        return torch.cudnn_convolution_relu(x, w, b, (stride,) * 2, (padding,) * 2, (1, 1), 1)

    def through(layer: Callable[..., torch.Tensor], with_bias: bool, layout: torch.memory_format) -> Callable[[], Any]:
        own = [w.contiguous(memory_format=layout) for w in weights]
        images = given.contiguous(memory_format=layout)

        def run() -> torch.Tensor:
            x = images
            for w, b, (_, _, k, stride) in zip(own, biases, shapes, strict=True):
                bias = b if with_bias else None
                x = F.conv2d(x, w, bias, stride) if k == 8 else layer(x, w, bias, stride, k // 2)
            return x

        return run

    last, first = torch.channels_last, torch.contiguous_format
    candidates = {
        "channels last": [through(plain, False, last)],
        "channels last, bias": [through(plain, True, last)],
        "channels first": [through(plain, False, first)],
        **({"channels last, bias, fused": [through(fused, True, last)]} if device.type == "cuda" else {}),
    }
    for row in _rows(candidates, device, sizes, 3000, f"LV-ViT-S stem, {sizes.images} images"):
        yield {**row, **({"images_per_s": sizes.images / row["us"] * 1e6} if "us" in row else {})}


def _rows(
    candidates: dict[str, list[Callable[[], Any]]], device: torch.device, sizes: Sizes, expected_us: float, op: str
) -> Iterator[dict[str, Any]]:
    times, failed = microseconds(candidates, device, sizes.seconds, expected_us)
    for name, us in times.items():
        yield {"op": op, "variant": name, "us": us}
    for name, why in failed.items():
        yield {"op": op, "variant": name, "failed": why}
