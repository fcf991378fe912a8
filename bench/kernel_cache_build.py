"""Compile the suite's kernels without a GPU, under the keys of another Python's Triton.

    PYTHONPATH=.:kernels:bench python bench/kernel_cache_build.py --for FOLDER [--out kernels.tar.xz]

`make gpu-cache` runs this. FOLDER holds the same version of Triton, unpacked, for the target Python: the two differ
only in compiled libraries, such as libtriton.so, whose hash is part of every key. The models' forwards run on a CPU,
where launches are recorded instead of run; a stub replaces the driver.
"""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from aot import source
from candidates import PLAN, linears, shapes_of, tiles_of
from compile_ahead import compile_launch, launch_of
from dvit_kernels.launch import Launch, collecting, programmatic_launches
from dvit_kernels.linear import launch_linear
from forwards import checkpoint
from kernel_cache import PACKED, fingerprint, pack, short
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

import dvit_infer as dvit
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.ops.choices import Choices, using

TARGET = GPUTarget("cuda", 90, 32)
ARCHS = ("dynamicvit-deit-s", "dynamicvit-deit-b", "dynamicvit-lvvit-s")
MOST_BYTES = 20 << 20
BF16 = torch.bfloat16


class StubDriver:
    """The parts of a driver that Triton needs to compile without launching."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def key_for(folder: Path) -> str:
    """Return the key that the Triton in `folder` computes for itself.

    Raises:
        SystemExit: It is another version of Triton.
    """
    from triton.runtime.cache import triton_key

    here = Path(triton.__file__).parent
    for file in sorted(here.rglob("*.py")):
        other = folder / "triton" / file.relative_to(here)
        if not other.exists() or other.read_bytes() != file.read_bytes():
            raise SystemExit(f"error: {other}: is not the same as Triton {triton.__version__} has it here")
    library = Path("_C") / "libtriton.so"
    own, theirs = (hashlib.sha256((at / library).read_bytes()).hexdigest() for at in (here, folder / "triton"))
    key = triton_key()
    assert key.count(own) == 1, "Triton's key holds the hash of libtriton.so once"
    return key.replace(own, theirs)


def recorded() -> Iterator[Launch]:
    """Yield every launch of the suite's forwards, with meta tensors as arguments."""
    for arch in ARCHS:
        for method in ("predictor", "none"):
            engine = dvit.convert(checkpoint(arch, False), device="cpu", backend="torch", dtype=BF16, method=method)
            for programmatic in (False, True):  # 128: one of two branches
                yield from launches_of(engine, (256, 1, 128), (BF16, torch.uint8), programmatic)
    for arch, dtype in itertools.product((*ARCHS, "deit-b-distilled"), (BF16, torch.float16, torch.float32)):
        engine = dvit.convert(checkpoint(arch, False), device="cpu", backend="torch", dtype=dtype)
        yield from launches_of(engine, (64,), (dtype,), False)  # as tests verify them


def launches_of(
    engine: dvit.Engine, batches: Sequence[int], inputs: Sequence[torch.dtype], programmatic: bool
) -> Iterator[Launch]:
    """Yield the launches of forwards for these batch sizes and dtypes."""
    found: list[Launch] = []

    def record(launch: Launch) -> None:
        for value in launch.arguments.values():
            if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
                value.zero_()  # uncomputed positions must be valid
        found.append(replace(launch, arguments={name: _bare(value) for name, value in launch.arguments.items()}))

    with using(Choices(programmatic=programmatic)), _launching(record), programmatic_launches(programmatic):
        runner = TritonRunner(engine.graph)
        for batch, dtype in itertools.product(batches, inputs):
            if dtype != torch.uint8 or runner.takes_uint8:
                runner.run(torch.zeros(1, 3, *engine.config.image_size, dtype=dtype).expand(batch, -1, -1, -1))
    print(f"{engine.config.arch}, {engine.config.reduction}, {engine.dtype}: {len(found)} launches", flush=True)
    yield from found


def _bare(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(_bare(value.base), value.shape, value.strides, value.block_shape)
    if not isinstance(value, torch.Tensor):
        return value
    assert value.data_ptr() % 16 == 0, "another alignment compiles to another kernel"
    return torch.empty_like(value, device="meta")


@contextlib.contextmanager
def _launching(record: Any) -> Iterator[None]:
    """Record launches inside the block, and replace PyTorch's convolutions by empty tensors of their shape."""
    run, conv2d = Launch.run, F.conv2d

    def no_conv2d(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        like = conv2d(x.to("meta"), w.to("meta"), None if b is None else b.to("meta"), **more)
        return torch.zeros(1, dtype=like.dtype).expand(like.shape).contiguous(memory_format=torch.channels_last)

    Launch.run, F.conv2d = record, no_conv2d
    try:
        yield
    finally:
        Launch.run, F.conv2d = run, conv2d


def candidates() -> Iterator[Launch]:
    """Yield the launches that bench/tune.py and bench/machine.py time."""
    for model, batch in PLAN:
        for shape in shapes_of(model, batch, BF16):
            for tile in tiles_of(shape, BF16, False):
                yield launch_of(shape, tile, BF16)
    for c in (384, 768):
        fc1 = linears(256, 197, c, 4 * c, BF16)[2]
        x, weight = (torch.empty(rows, c, dtype=BF16, device="meta") for rows in (fc1.rows, fc1.dim_out))
        stats, sums = torch.empty(fc1.rows, c // 64, 2, device="meta"), torch.empty(fc1.dim_out, device="meta")
        with collecting() as launches:
            for form in ("none", "gelu", "gelu_poly", "gelu_tanh", "gelu_tanh_approx"):
                launch_linear(x, weight, weight[:, 0], None, sums, stats, 1e-6, form)
        yield from launches


def distinct() -> list[Launch]:
    """Return one launch for each distinct kernel."""
    found: dict[str, Launch] = {}
    for launch in (*recorded(), *candidates()):
        made = source(launch)
        key = (launch.kernel.__name__, made.signature, made.constants, made.attrs, launch.options_for(TARGET.arch))
        found.setdefault(str(key), launch)
    return list(found.values())


def compile_one(index: int) -> str | None:
    """Compile one of `LAUNCHES`; return the compiler's error, if any."""
    launch = LAUNCHES[index]
    try:
        compile_launch(launch, *divmod(TARGET.arch, 10))
    except Exception as error:  # a tile that does not fit fails again when it is measured
        return f"{launch.kernel.__name__}: {repr(error)[:200]}"
    return None


LAUNCHES: list[Launch] = []


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--for", dest="folder", type=Path, required=True, help="Triton for the other Python, unpacked")
    parser.add_argument("--out", type=Path, default=PACKED, help="(default: %(default)s)")
    given = parser.parse_args()
    key, start = key_for(given.folder), time.monotonic()
    triton.runtime.driver.set_active(StubDriver())
    triton.runtime.cache.triton_key = lambda: key
    LAUNCHES.extend(distinct())
    print(f"{len(LAUNCHES)} kernels for {TARGET.backend} {TARGET.arch}, Triton's key {short(key)}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
            complaints = list(filter(None, pool.map(compile_one, range(len(LAUNCHES)), chunksize=4)))
        print("\n".join(complaints))
        manifest = {"triton_key": short(key), "target": f"sm_{TARGET.arch}", "triton": triton.__version__}
        count = pack(Path(cache), {**manifest, "sources": fingerprint()}, given.out)
    size = given.out.stat().st_size
    print(f"{given.out}: {count} kernels, {size / 2**20:.1f} MiB, {time.monotonic() - start:.0f} s")
    return 1 if size > MOST_BYTES or count + len(complaints) != len(LAUNCHES) else 0


if __name__ == "__main__":
    sys.exit(main())
