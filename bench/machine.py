"""What a GPU can do at best, in the figures that this project's decisions hang on.

    PYTHONPATH=.:kernels python bench/machine.py --out machine.json

Copy bandwidth, bfloat16 matrix product, reading through the L2 cache by how much is read, what a launch costs on a
stream, in a CUDA graph and with programmatic dependent launch, patch embedding, each form of GELU behind a linear, fc1
in float8; and the stem of LV-ViT by itself. Each fails alone.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from dvit_kernels.launch import Launch, programmatic_launches, wait_for_inputs
from launches import copies, microseconds
from rows import Part, Row, Rows, arguments, device_for
from torch.nn import functional as F

LAUNCHES = 500


class Sizes(NamedTuple):
    """How much is measured; `DRY` is little enough for Triton's interpreter."""

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


@triton.jit
def _nothing_kernel(x_ptr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    tl.store(x_ptr, tl.load(x_ptr) + 1.0)


@triton.jit
def _read_kernel(x_ptr, y_ptr, programs, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Every program reads BLOCKS blocks, all programs together each block as often as the others."""
    wait_for_inputs(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    at = tl.program_id(0).to(tl.int64) * BLOCK
    for _ in range(BLOCKS):
        total += tl.load(x_ptr + at + tl.arange(0, BLOCK)).to(tl.float32)
        at += programs.to(tl.int64) * BLOCK
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, axis=0))


def peaks(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    n = sizes.product
    x, y = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    us = _us(lambda: x @ y, device, 1500)
    yield {"op": f"matrix product {n}^3, bfloat16", "us": us, "tflops": 2 * n**3 / us / 1e6}
    source = torch.empty(int(sizes.copy_mib * 2**20), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    us = _us(lambda: target.copy_(source), device, 500)
    yield {"op": f"copy of {sizes.copy_mib:g} MiB", "us": us, "tb_per_s": 2 * source.numel() / us / 1e6}


def cache(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """The same bytes read over and over: below the cache's size they come from it."""
    programs, block = sizes.programs, sizes.block
    y = torch.empty(programs, device=device)
    for mib in sizes.cache_mib:
        blocks = max(1, round(mib * 2**20 / (programs * block * 2)))
        x = torch.randn(programs * blocks * block, device=device).bfloat16()
        given = {"x_ptr": x, "y_ptr": y, "programs": programs, "BLOCKS": blocks, "BLOCK": block}
        launch = Launch.of(_read_kernel, (programs,), num_warps=8, num_stages=1, **given)
        us = _us(launch.run, device, 20)
        yield {"op": f"read {x.numel() * 2 / 2**20:.0f} MiB again", "us": us, "tb_per_s": x.numel() * 2 / us / 1e6}


def gaps(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Microseconds from one launch to the next, of kernels that do nothing and wait for each other."""
    x = torch.zeros(1, device=device)

    def launch(programmatic: bool) -> Callable[[], None]:
        with programmatic_launches(programmatic):
            return Launch.of(_nothing_kernel, (1,), x_ptr=x, num_warps=4, num_stages=1).run

    yield {"op": "a launch in a graph", "us": _us(launch(False), device, 3)}
    if device.type == "cpu":
        return
    if torch.cuda.get_device_capability(device) >= (9, 0):
        yield {"op": "a launch in a graph, programmatic", "us": _us(launch(True), device, 3)}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for name, call in (("Triton, on a stream", launch(False)), ("PyTorch, on a stream", lambda: x.add_(1.0))):
        call()
        start.record()
        for _ in range(LAUNCHES):
            call()
        end.record()
        end.synchronize()
        yield {"op": f"a launch by {name}", "us": start.elapsed_time(end) * 1e3 / LAUNCHES}


def stem(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """LV-ViT-S's four convolutions: channels last and not, without bias, with it, and fused with bias and ReLU.

    PyTorch adds a bias behind cuDNN's convolution, and then applies ReLU: two passes over the result that
    `torch.cudnn_convolution_relu` does not make.
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


def patch_embedding(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Images to tokens of DeiT-S: the kernel from uint8 and bfloat16, a convolution and what follows."""
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
    """fc1 of DeiT-S and -B by `torch._scaled_mm` beside bfloat16: whether float8 is worth a second look.

    The product alone, of tensors that are in float8 already, with one scale each.
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


def _rows(
    candidates: dict[str, list[Callable[[], Any]]], device: torch.device, sizes: Sizes, expected_us: float, op: str
) -> Iterator[dict[str, Any]]:
    times, failed = microseconds(candidates, device, sizes.seconds, expected_us)
    for name, us in times.items():
        yield {"op": op, "variant": name, "us": us}
    for name, why in failed.items():
        yield {"op": op, "variant": name, "failed": why}


def _us(call: Callable[[], object], device: torch.device, expected: float) -> float:
    times, failed = microseconds({"it": [call]}, device, 0.3 if device.type == "cuda" else 0.0, expected)
    if failed:
        raise RuntimeError(failed["it"])
    return times["it"]


PARTS = (gaps, peaks, cache, patch_embedding, activations, stem, float8)


def measured(part: Callable[[torch.device, Sizes], Iterator[Row]], device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """The rows of one of `PARTS`, said to be measured: a row of limits may be derived."""
    for row in part(device, sizes):
        yield {"runtime": "measured", **row}


def main() -> int:
    parser = arguments(__doc__, 45)
    names = ",".join(part.__name__ for part in PARTS)
    parser.add_argument("--only", default=names, help="(default: %(default)s)")
    given = parser.parse_args()
    device, sizes = device_for(given.dry), DRY if given.dry else Sizes()
    parts = [part for part in PARTS if part.__name__ in given.only.split(",")]
    jobs = [(part.__name__, lambda part=part: measured(part, device, sizes)) for part in parts]
    return Part(Rows(given.out, given.add), device, given.budget).run(jobs)


if __name__ == "__main__":
    sys.exit(main())
