"""What a GPU can do at best, in the figures that this project's decisions hang on.

    PYTHONPATH=.:kernels python bench/machine.py --out machine.json

Copy bandwidth, bfloat16 matrix product, reading through the L2 cache by how much is read, what a launch costs on a
stream, in a CUDA graph and with programmatic dependent launch, patch embedding, each form of GELU behind a linear; and
the stem of LV-ViT by itself.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from dvit_kernels.launch import Launch, programmatic_launches, wait_for_inputs
from launches import copies, microseconds
from torch.nn import functional as F

from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.utils.tables import table

LAUNCHES = 500


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


def peaks(device: torch.device) -> Iterator[dict[str, Any]]:
    n = 8192
    x, y = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    us = _us(lambda: x @ y, device, 1500)
    yield {"op": f"matrix product {n}^3, bfloat16", "us": us, "tflops": 2 * n**3 / us / 1e6}
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    us = _us(lambda: target.copy_(source), device, 500)
    yield {"op": "copy of 1 GiB", "us": us, "tb_per_s": 2 * source.numel() / us / 1e6}


def cache(device: torch.device) -> Iterator[dict[str, Any]]:
    """The same bytes read over and over: below the cache's size they come from it."""
    programs, block = 132 * 8, 4096
    y = torch.empty(programs, device=device)
    for mib in (8, 16, 24, 32, 40, 48, 64, 96, 256):
        blocks = max(1, round(mib * 2**20 / (programs * block * 2)))
        x = torch.randn(programs * blocks * block, device=device).bfloat16()
        given = {"x_ptr": x, "y_ptr": y, "programs": programs, "BLOCKS": blocks, "BLOCK": block}
        launch = Launch.of(_read_kernel, (programs,), num_warps=8, num_stages=1, **given)
        us = _us(launch.run, device, 20)
        yield {"op": f"read {x.numel() * 2 / 2**20:.0f} MiB again", "us": us, "tb_per_s": x.numel() * 2 / us / 1e6}


def gaps(device: torch.device) -> Iterator[dict[str, Any]]:
    """Microseconds from one launch to the next, of kernels that do nothing and wait for each other."""
    x = torch.zeros(1, device=device)

    def launch(programmatic: bool) -> Callable[[], None]:
        with programmatic_launches(programmatic):
            return Launch.of(_nothing_kernel, (1,), x_ptr=x, num_warps=4, num_stages=1).run

    for name, programmatic in (("in a graph", False), ("in a graph, programmatic", True)):
        yield {"op": f"a launch {name}", "us": _us(launch(programmatic), device, 3)}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for name, call in (("Triton, on a stream", launch(False)), ("PyTorch, on a stream", lambda: x.add_(1.0))):
        call()
        start.record()
        for _ in range(LAUNCHES):
            call()
        end.record()
        end.synchronize()
        yield {"op": f"a launch by {name}", "us": start.elapsed_time(end) * 1e3 / LAUNCHES}


def stem(device: torch.device) -> Iterator[dict[str, Any]]:
    """LV-ViT-S's four convolutions at batch 256, channels last and not."""
    shapes = ((3, 64, 7, 2), (64, 64, 3, 1), (64, 64, 3, 1), (64, 384, 8, 8))
    weights = [torch.randn(o, i, k, k, device=device).bfloat16() * 0.05 for i, o, k, _ in shapes]
    for name, layout in (("channels last", torch.channels_last), ("channels first", torch.contiguous_format)):
        own = [w.contiguous(memory_format=layout) for w in weights]
        images = torch.randn(256, 3, 224, 224, device=device).bfloat16().contiguous(memory_format=layout)

        def run(own: list[torch.Tensor] = own, images: torch.Tensor = images) -> torch.Tensor:
            x = images
            for w, (_, _, k, stride) in zip(own, shapes, strict=True):
                x = F.conv2d(x, w, stride=stride, padding=0 if k == 8 else k // 2).relu_()
            return x

        us = _us(run, device, 2000)
        yield {"op": f"LV-ViT-S stem, 256 pictures, {name}", "us": us, "images_per_s": 256 / us * 1e6}


def patch_embedding(device: torch.device) -> Iterator[dict[str, Any]]:
    """Pictures to tokens at batch 256 of DeiT-S: the kernel from uint8 and bfloat16, a convolution and what follows."""
    from dvit_kernels.patch_embedding import launch_patch_embedding

    from dvit_infer.ops.patch_embedding import pack_patch_embedding

    weight, bias = torch.randn(384, 3, 16, 16, device=device) * 0.03, torch.zeros(384, device=device)
    prefix, pos = torch.zeros(1, 1, 384, device=device), torch.randn(1, 197, 384, device=device)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    count = copies(256 * 3 * 224 * 224, device)
    pictures = [torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8, device=device) for _ in range(count)]
    floats = [one.bfloat16() for one in pictures[:3]]
    by_uint8 = pack_patch_embedding(weight, bias, prefix, pos, torch.bfloat16, mean, std)
    by_float = pack_patch_embedding(weight, bias, prefix, pos, torch.bfloat16)
    half = [t.bfloat16() for t in (weight, bias, prefix, pos)]

    def plain(one: torch.Tensor) -> torch.Tensor:
        tokens = F.conv2d(one, half[0], half[1], stride=16).flatten(2).transpose(1, 2)
        return torch.cat([half[2].expand(len(one), -1, -1), tokens], dim=1) + half[3]

    ways = {
        "uint8, kernel": [lambda one=one: launch_patch_embedding(one, *by_uint8, 16) for one in pictures],
        "bfloat16, kernel": [lambda one=one: launch_patch_embedding(one, *by_float, 16) for one in floats],
        "bfloat16, convolution": [lambda one=one: plain(one) for one in floats],
    }
    times, failed = microseconds(ways, device, 1.0, 60)
    for name, us in times.items():
        yield {"op": f"patch embedding, DeiT-S, 256 pictures, {name}", "us": us}
    for name, why in failed.items():
        yield {"op": f"patch embedding, {name}", "failed": why}


def activations(device: torch.device) -> Iterator[dict[str, Any]]:
    """fc1 of DeiT-S and -B at batch 256, its LayerNorm folded, with each form of GELU behind it and with none."""
    from dvit_kernels.linear import default_tile, launch_linear

    rows = 256 * 197
    for name, c in (("S", 384), ("B", 768)):
        weight, bias = (torch.randn(4 * c, *k, device=device).bfloat16() * c**-0.5 for k in ((c,), ()))
        stats = torch.tensor([0.0, 128.0], device=device).repeat(rows, c // 128, 1)
        x = [torch.randn(rows, c, device=device).bfloat16() for _ in range(copies(10 * rows * c, device))]
        given = weight, bias, None, weight.float().sum(dim=1), stats, 1e-6
        tile = default_tile(rows, 4 * c, torch.bfloat16)

        def ways(form: str, x: list[torch.Tensor] = x, given: Any = given, tile: Any = tile) -> list[Callable[[], Any]]:
            return [lambda one=one: launch_linear(one, *given, form, tile=tile) for one in x]

        forms = ("none", "gelu", "gelu_poly", "gelu_tanh", "gelu_tanh_approx")
        flops = 8 * rows * c**2
        times, failed = microseconds({form: ways(form) for form in forms}, device, 1.0, flops / 4e8)
        for form, us in times.items():
            yield {"op": f"fc1, DeiT-{name}, 256 pictures, {form}", "us": us, "tflops": flops / us / 1e6}
        for form, why in failed.items():
            yield {"op": f"fc1, DeiT-{name}, {form}", "failed": why}


def _us(call: Callable[[], object], device: torch.device, expected: float) -> float:
    times, failed = microseconds({"it": [call]}, device, 0.3, expected)
    return times["it"] if times else float("nan") if not failed else _fail(failed["it"])


def _fail(why: str) -> float:
    print(f"not measured: {why}")
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device("cuda")
    rows: list[dict[str, Any]] = []
    for part in (gaps, peaks, cache, patch_embedding, activations, stem):
        new = [{"how": "measured", **row} for row in part(device)]
        rows += new
        write_json(given.out, {"environment": environment(), "rows": rows})
        columns = [key for key in ("us", "tflops", "tb_per_s", "images_per_s") if any(key in row for row in new)]
        cells = [(row["op"], *(f"{row[key]:.4g}" if key in row else "" for key in columns)) for row in new]
        print(table((part.__name__, *(f">{key}" for key in columns)), cells), flush=True)


if __name__ == "__main__":
    main()
