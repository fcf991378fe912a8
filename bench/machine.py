"""Measure the limits of a GPU on which design decisions depend.

    PYTHONPATH=.:kernels python bench/machine.py --out machine.json

The parts are copy bandwidth, bfloat16 matrix product, L2 bandwidth by size, launch overhead on a stream, in a CUDA
graph and with programmatic dependent launch, patch embedding, each form of GELU after a linear, fc1 in float8, and the
stem of LV-ViT. Each may fail by itself.
"""

import sys
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from dvit_kernels.launch import Launch, programmatic_launches, wait_for_inputs
from launches import microseconds
from layers import DRY, Sizes, activations, float8, measured, patch_embedding, stem
from rows import Part, Row, Rows, arguments, device_for

LAUNCHES = 500


@triton.jit
def _nothing_kernel(x_ptr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    tl.store(x_ptr, tl.load(x_ptr) + 1.0)


@triton.jit
def _read_kernel(x_ptr, y_ptr, programs, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Read BLOCKS blocks in every program, so that all programs together read each block equally often."""
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
    """Time repeated reads of the same bytes, which come from the cache if they fit."""
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
    """Time the interval between launches of empty kernels that wait for each other."""
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


def _us(call: Callable[[], object], device: torch.device, expected: float) -> float:
    times, failed = microseconds({"it": [call]}, device, 0.3 if device.type == "cuda" else 0.0, expected)
    if failed:
        raise RuntimeError(failed["it"])
    return times["it"]


PARTS = (gaps, peaks, cache, patch_embedding, activations, stem, float8)


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
