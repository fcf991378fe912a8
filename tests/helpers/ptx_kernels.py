"""Small kernels written in PTX for tests of kernels/emulate: their body given, the rest put around it."""

import numpy as np
from emulate.machine import Machine
from emulate.memory import GlobalMemory
from emulate.ptx import parse
from emulate.schedule import Schedule

_KERNEL = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry small(%s)
.reqntid %d
{
    .reg .pred %%p<32>;
    .reg .b16 %%rs<32>;
    .reg .b32 %%r<200>;
    .reg .b64 %%rd<32>;
    mov.u32 %%r0, %%tid.x;
    %s
    %s
    ret;
}
"""


def run_ptx(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    order: str = "together",
    early_copies: bool = False,
    maps: tuple = (),
) -> np.ndarray:
    """The first array after the kernel has run: it alone may be stored to, all may be loaded.

    The body finds the address of array i in %rd<i>, its thread in %r0, and %r1 to %r3 are 4, 8 and 16 times that as are
    %rd11 to %rd13. `maps` are further parameters, tensor maps made of the arrays' addresses.
    """
    memory, parameters = GlobalMemory(), []
    for i, array in enumerate(arrays):
        data = array.reshape(-1).view(np.uint8)
        allowed = np.ones(len(data), np.bool_)
        parameters.append(memory.add(data, [f"array {i}"], allowed, allowed if i == 0 else ~allowed))
    memory.seal()
    names = [f"small_param_{i}" for i in range(len(arrays) + len(maps))]
    values = [*parameters, *(make(parameters) for make in maps)]
    declared = [f".param .u64 {name}" for name in names[: len(arrays)]]
    declared += [f".param .align 64 .b8 {name}[128]" for name in names[len(arrays) :]]
    loads = [f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names[: len(arrays)])]
    loads += [f"mul.lo.s32 %r{i}, %r0, {4 * 2 ** (i - 1)}; cvt.u64.u32 %rd{10 + i}, %r{i};" for i in (1, 2, 3)]
    program = parse(_KERNEL % (",\n".join(declared), threads, "\n".join(loads), body))
    parameters_by_name = dict(zip(names, values, strict=True))
    machine = Machine(program, (blocks,), threads, memory, shared, parameters_by_name, early_copies)
    Schedule(machine, order).run()
    result = memory.bytes_at(parameters[0], arrays[0].nbytes).copy()
    return result.view(arrays[0].dtype).reshape(arrays[0].shape)


def compute(body: str, *sources: np.ndarray, out: type = np.uint32) -> np.ndarray:
    """What a body leaves in %r9, of 32-bit sources in %r10, %r11, ..., one element a lane."""
    threads = len(sources[0])
    loads = [
        f"add.s64 %rd20, %rd{i + 1}, %rd11; ld.global.b32 {{ %r{10 + i} }}, [ %rd20 + 0 ];" for i in range(len(sources))
    ]
    store = "add.s64 %rd20, %rd0, %rd11; st.global.b32 [ %rd20 + 0 ], { %r9 };"
    return run_ptx("\n".join([*loads, body, store]), np.zeros(threads, out), *sources, threads=threads)
