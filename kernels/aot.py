"""Compile every kernel ahead of time, without a GPU, and compare registers, shared memory and spills with AOT.md.

`make aot` runs this with the installed Triton, `make aot TRITON=3.6.0` with another; UPDATE=1 rewrites the table.
"""

import argparse
import difflib
import functools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from dvit_kernels.launch import Launch
from shapes import launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

# Spills of one Triton version that has no table, to the byte: debts to be paid by other tiles. Any other spill fails.
KNOWN_SPILLS = Path(__file__).with_name("known_spills.txt")
TABLE = Path(__file__).with_name("AOT.md")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HOPPER = 90  # the first with programmatic dependent launch and tensor descriptors
# CUDA programming guide, table 27: shared memory per block and per multiprocessor, in bytes; each block uses 1 KiB more
# than it requests. Registers are allocated per thread in multiples of eight.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED = {capability: limit + 1024 for capability, limit in SHARED_LIMIT.items()}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # per multiprocessor, on all three
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.float64: "fp64",
}


def source(launch: Launch) -> ASTSource:
    """Return the kernel with its argument types, specialised as by Triton at run time: 1, and divisible by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = isinstance(value, torch.Tensor)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[parameter.name] = "fp32"
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def name(launch: Launch) -> str:
    """Return the label of a table line: kernel, dtypes of matrices, absent tensors, strides of a linear, constants."""
    given = launch.arguments
    tensors = (v.base if isinstance(v, TensorDescriptor) else v for v in given.values())
    matrices = [v for v in tensors if isinstance(v, torch.Tensor) and v.ndim > 1]
    dtypes = sorted({NAMES[v.dtype] for v in matrices if v.dtype not in (torch.int64, torch.float32)} or {"fp32"})
    # A pair bias, a signal and a rotation are labelled where they are present, by PAIR_UNIT, LEAVES and NUM_PREFIX.
    present = ("norm_ptr", "positions_ptr")
    labelled = ("pair_ptr", "signal_ptr", "sin_ptr", "cos_ptr", *present)
    pointers = (p.name for p in launch.kernel.params if p.name.endswith("_ptr") and p.name not in labelled)
    without = [f"no-{name.removesuffix('_ptr')}" for name in pointers if given[name] is None]
    linear = "residual_tokens" in given  # whose strides may be None, for adjacent rows
    strides = [
        n for n in ("x_tokens", "stride_xn", "residual_tokens", "stride_rn") if linear and given.get(n) is not None
    ]
    constants = [p.name for p in launch.kernel.params if p.is_constexpr and p.name != "PDL"]
    values = [f"{c}={given[c]}" for c in constants if given[c] is not None] + ["PDL"] * bool(given["PDL"])
    extra = [name.removesuffix("_ptr") for name in present if given.get(name) is not None]
    words = [launch.kernel.__name__, *dtypes, *without, *extra, *strides, *values]
    words += [f"warps={launch.num_warps}", f"stages={launch.num_stages}"]
    return " ".join([*words, f"maxnreg={launch.maxnreg}"] if launch.maxnreg else words)


def runs_on(launch: Launch, capability: int) -> bool:
    """Return whether the launch can run on a target: some need Hopper."""
    given = launch.arguments
    return capability >= HOPPER or not (given["PDL"] or any(isinstance(v, TensorDescriptor) for v in given.values()))


class Usage(NamedTuple):
    """The resources that a program uses on a multiprocessor.

    Attributes:
        registers: registers per thread.
        shared: bytes of shared memory per program.
        stack: bytes per thread, for spilled registers.
        programs: programs that fit on a multiprocessor at a time.
    """

    registers: int
    shared: int
    stack: int
    programs: int


def programs(capability: int, registers: int, shared: int, threads: int) -> int:
    """Return how many programs of so many threads a multiprocessor holds at a time."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, SHARED[capability] // (shared + 1024), THREADS // threads, BLOCKS)


def compile_for(launch: Launch, capability: int) -> Usage:
    target, options = GPUTarget("cuda", capability, 32), launch.options_for(capability)
    compiled = triton.compile(source(launch), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1])
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    return Usage(registers, shared, stack, programs(capability, registers, shared, threads))


@functools.cache
def distinct() -> dict[str, Launch]:
    """Return one launch per line of the table; others with the same label compile to the same kernel."""
    found: dict[str, Launch] = {}
    for launch in launches():
        first, this = source(found.setdefault(name(launch), launch)), source(launch)
        assert (first.signature, first.attrs) == (this.signature, this.attrs), name(launch)
    return found


def measured(line: str, capability: int) -> tuple[str, int, Usage | str]:
    """Return label and target of a distinct launch, with the result of `compile_for` or the compiler's error."""
    launch = distinct()[line]
    try:
        return line, capability, compile_for(launch, capability)
    except Exception as error:  # the compiler raises any kind: the table names the kernel, and the run continues
        return line, capability, repr(error)[-300:]


def section(results: dict[str, dict[int, Usage]]) -> str:
    """Return the table for one Triton version."""
    columns = [f"sm_{capability}" for capability in SHARED_LIMIT] + ["programs a multiprocessor"]
    lines = [f"## Triton {triton.__version__}", "", " | ".join(["| kernel", *columns]) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for line, cells in sorted(results.items()):
        used = ("{} / {} / {}".format(*cells[c]) if c in cells else "not there" for c in SHARED_LIMIT)
        fit = " / ".join(str(cells[c].programs) if c in cells else "-" for c in SHARED_LIMIT)
        lines.append(" | ".join([f"| {line}", *used, fit]) + " |")
    return "\n".join(lines) + "\n"


HEADER = """# Kernels compiled ahead of time

Made by `make aot UPDATE=1` for the installed Triton, `make aot UPDATE=1 TRITON=3.6.0` for another. `make aot` fails
when a kernel does not compile, spills, asks for more shared memory than the target has, or differs from its line here.
A cell is registers a thread / shared memory a program in bytes / stack a thread in bytes, which is where registers
spill. The last column is how many programs fit on a multiprocessor at a time, on each of the three. They say nothing
about time.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the table of this Triton version anew")
    parser.add_argument("--untabled", action="store_true", help="a version without a table will do")
    given = parser.parse_args()

    results: dict[str, dict[int, Usage]] = {}
    failures = set()
    known = set(KNOWN_SPILLS.read_text().splitlines())
    with ProcessPoolExecutor() as pool:
        jobs = [
            (line, capability)
            for line, launch in distinct().items()
            for capability in SHARED_LIMIT
            if runs_on(launch, capability)
        ]
        for done, (line, capability, result) in enumerate(pool.map(measured, *zip(*jobs, strict=True)), start=1):
            if sys.stderr.isatty():
                print(f"\r{done} of {len(jobs)}", end="", file=sys.stderr)
            if isinstance(result, str):
                failures.add(f"sm_{capability} {line}: does not compile, {result}")
                continue
            results.setdefault(line, {})[capability] = result
            if result.stack:
                spill = f"sm_{capability} {line}: spills, {result.stack} bytes of stack"
                if f"{triton.__version__} {spill}" in known:
                    print(f"aot: known: {spill}", file=sys.stderr)
                else:
                    failures.add(spill)
            if result.shared > (limit := SHARED_LIMIT[capability]):
                failures.add(f"sm_{capability} {line}: {result.shared} bytes of shared memory, the limit is {limit}")
    for failure in sorted(failures):
        print(f"aot: {failure}", file=sys.stderr)
    if failures:
        return 1
    return _hold_against_table(section(results), given.update, given.untabled)


def _hold_against_table(new: str, update: bool, untabled: bool) -> int:
    """Compare with AOT.md's section for this version, or rewrite it if requested."""
    text = TABLE.read_text() if TABLE.exists() else HEADER
    sections = {part.splitlines()[0]: part.rstrip() + "\n" for part in re.split(r"^(?=## )", text, flags=re.M)[1:]}
    heading = new.splitlines()[0]
    version = triton.__version__
    if update:
        sections[heading] = new
        in_order = sorted(sections, key=lambda key: [int(part) for part in re.findall(r"\d+", key)])
        TABLE.write_text("\n".join([HEADER, *(sections[key] for key in in_order)]))
        print(f"aot: Triton {version}: {TABLE.name} written")
        return 0
    if heading not in sections and untabled:
        print(f"aot: Triton {version}: all kernels compile and fit; {TABLE.name} has no such version")
        return 0
    old = sections.get(heading, "").splitlines()
    difference = list(difflib.unified_diff(old, new.splitlines(), lineterm="", n=0))[2:]
    if difference:
        print("\n".join(difference), file=sys.stderr)
        again = "make aot UPDATE=1, with the same TRITON=, writes it"
        print(f"aot: Triton {version}: {TABLE.name} says otherwise; if that is meant, {again}", file=sys.stderr)
        return 1
    print(f"aot: Triton {version}: {new.count('_kernel ')} kernels compile, fit and are as in {TABLE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
