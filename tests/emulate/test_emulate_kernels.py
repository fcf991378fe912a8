"""Compiled kernels in kernels/emulate: the same bits whatever the order, and what breaks one of them is noticed."""

import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from dvit_kernels.attention import AttentionTile, launch_attention
from dvit_kernels.launch import Launch, collecting
from dvit_kernels.layer_norm import launch_layer_norm
from dvit_kernels.linear import LinearTile, launch_linear
from dvit_kernels.linear_tma import PREFETCHING
from emulate.errors import EmulationError
from emulate.launching import OUTPUTS, compiled_for, run
from emulate.schedule import ORDERS
from shapes import launches

pytestmark = [pytest.mark.emulated, pytest.mark.quick]


def linear() -> torch.Tensor:
    x, weight = torch.randn(100, 200, dtype=torch.bfloat16), torch.randn(80, 200, dtype=torch.bfloat16)
    return launch_linear(x, weight, tile=LinearTile(64, 64, 32, 4, 3))[0]


def single_pass() -> torch.Tensor:
    return launch_attention(*torch.randn(1, 70, 3, 2, 64, dtype=torch.bfloat16).unbind(2), 0.125)


def online() -> torch.Tensor:
    tile = AttentionTile(64, 32, num_stages=3)
    return launch_attention(*torch.randn(1, 70, 3, 2, 64, dtype=torch.bfloat16).unbind(2), 0.125, tile=tile)


def layer_norm() -> torch.Tensor:
    return launch_layer_norm(torch.randn(5, 384, dtype=torch.bfloat16))


def by_tma() -> torch.Tensor:
    x, weight = torch.randn(300, 192, dtype=torch.bfloat16), torch.randn(256, 192, dtype=torch.bfloat16)
    return launch_linear(x, weight, weight[:, 0], tile=LinearTile(128, 128, 64, 8, 4, PREFETCHING))[0]


def made(make: Callable[[], torch.Tensor]) -> tuple[Launch, torch.Tensor]:
    """The launch, and the tensor it writes; of a persistent kernel three programs for six tiles."""
    with collecting() as found:
        out = make()
    [launch] = found
    return (dataclasses.replace(launch, grid=(3,)) if make is by_tma else launch), out


KERNELS = [*itertools.product([linear, single_pass, online, layer_norm], [80, 90]), (by_tma, 90)]


@pytest.mark.parametrize(("make", "capability"), KERNELS)
def test_the_bits_depend_neither_on_the_order_of_warps_nor_on_when_copies_land(make, capability):
    torch.manual_seed(1)
    launch, out = made(make)
    answers = []
    for order, early_copies in itertools.product(ORDERS, (False, True)):
        out.fill_(float("nan"))
        run(launch, capability, order, early_copies)
        answers.append(out.clone())
    assert answers[0].isfinite().all()
    assert all(torch.equal(other, answers[0]) for other in answers[1:])


def mutants(ptx: str, pattern: str, weaker: str) -> list[str]:
    """The text with each match of the pattern, one at a time, replaced."""
    return [ptx[: m.start()] + m.expand(weaker) + ptx[m.end() :] for m in re.finditer(pattern, ptx)]


COPYING = r"(ldmatrix|wgmma\.mma_async)\S* .*: (load|asynchronous read) of bytes that a copy is still writing"
READING = r"wgmma\.wait_group\S* 2: written over what was still being read asynchronously"
ON_ITS_WAY = r"is read while a product has it"
UNFENCED = r"asynchronous read of what was stored with no fence of its proxy since"
STUCK = r"deadlock: lanes wait at mbarrier\.try_wait"
# The one wait of a pipelined loop: that behind it only sees to it that nothing is on its way when the kernel goes on.
IN_LOOP = r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;", COPYING


@pytest.mark.parametrize(
    ("make", "capability", "pattern", "weaker", "message"),
    [
        (linear, 80, *IN_LOOP),
        (online, 80, *IN_LOOP),
        (linear, 90, *IN_LOOP),
        (online, 90, *IN_LOOP),
        (linear, 90, r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;", READING),
        (linear, 90, r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;", ON_ITS_WAY),
        (linear, 90, r"fence\.proxy\.async\.shared::cta;", "", UNFENCED),
        (by_tma, 90, r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;", READING),
        (
            by_tma,
            90,
            r"(arrive\.expect_tx\S* _, \[%r\d+\]), 32768;",
            r"\1, 16384;",
            STUCK,
        ),
    ],
)
def test_a_weakened_wait_or_a_dropped_fence_is_caught(make, capability, pattern, weaker, message):
    launch, _ = made(make)
    ptx = compiled_for(launch, capability).ptx
    run(launch, capability, ptx=ptx)
    weakened = mutants(ptx, pattern, weaker)
    assert weakened
    for other in weakened:
        with pytest.raises(EmulationError, match=f"_kernel: .*{message}"):
            run(launch, capability, ptx=other)


# How many barriers separate nothing that another one, or the start of the kernel, does not separate as well.
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("make", "redundant"), [(linear, 1), (single_pass, 1), (online, 2), (layer_norm, 0)])
def test_a_dropped_barrier_is_a_race(make, capability, redundant):
    torch.manual_seed(1)
    launch, out = made(make)
    run(launch, capability)
    expected, caught = out.clone(), []
    barrierless = mutants(compiled_for(launch, capability).ptx, r"bar\.sync\s+0;", "")
    assert len(barrierless) >= 4
    for ptx in barrierless:
        try:
            run(launch, capability, ptx=ptx)
        except EmulationError as error:
            caught.append(str(error))
        else:
            assert torch.equal(out, expected)
    assert len(barrierless) - len(caught) == redundant
    assert all(re.search(r"_kernel: \S+ .*: race: .*, at shared address 0x", error) for error in caught)


def test_rows_outside_a_view_are_neither_loaded_nor_stored():
    """Also where the memory is there."""
    launch, y = made(linear)
    x = launch.arguments["x_ptr"]
    for name, view, message in (("x_ptr", x[:99], "load of 16 bytes"), ("y_ptr", y[:99], "store of 16 bytes")):
        given = dataclasses.replace(launch, arguments=launch.arguments | {name: view})
        with pytest.raises(EmulationError, match=rf"_linear_kernel: .*{message} outside .* of {name}"):
            run(given)


def test_an_unknown_instruction_raises():
    launch, _ = made(layer_norm)
    ptx = compiled_for(launch, 80).ptx
    with pytest.raises(EmulationError, match=r"_layer_norm_kernel: rsqrt.rn.f64 .* float32 only"):
        run(launch, ptx=ptx.replace("rsqrt.approx.ftz.f32", "rsqrt.rn.f64"))
    with pytest.raises(EmulationError, match=r"_layer_norm_kernel: rsqrtt.approx.ftz.f32 .*: unknown instruction"):
        run(launch, ptx=ptx.replace("rsqrt.", "rsqrtt."))


def test_what_every_kernel_stores_to_is_said():
    assert {launch.kernel.__name__ for launch in launches()} == set(OUTPUTS)
