"""Compiled kernels in kernels/emulate: the same bits whatever the order, and what breaks one of them is noticed."""

import dataclasses
import itertools
import re

import pytest
import torch
from dvit_kernels.attention import AttentionTile, attention_launch
from dvit_kernels.launch import Launch
from dvit_kernels.layer_norm import layer_norm_launch
from dvit_kernels.linear import LinearTile, linear_launch
from emulate.errors import EmulationError
from emulate.launching import OUTPUTS, compiled_for, run
from emulate.schedule import ORDERS
from shapes import launches

pytestmark = [pytest.mark.emulated, pytest.mark.quick]


def linear() -> tuple[Launch, torch.Tensor]:
    x, weight = torch.randn(100, 200, dtype=torch.bfloat16), torch.randn(80, 200, dtype=torch.bfloat16)
    launch, y, _ = linear_launch(x, weight, tile=LinearTile(64, 64, 32, 4, 3))
    return launch, y


def single_pass() -> tuple[Launch, torch.Tensor]:
    return attention_launch(*torch.randn(1, 70, 3, 2, 64, dtype=torch.bfloat16).unbind(2), 0.125)


def online() -> tuple[Launch, torch.Tensor]:
    tile = AttentionTile(64, 32, num_stages=3)
    return attention_launch(*torch.randn(1, 70, 3, 2, 64, dtype=torch.bfloat16).unbind(2), 0.125, tile=tile)


def layer_norm() -> tuple[Launch, torch.Tensor]:
    return layer_norm_launch(torch.randn(5, 384, dtype=torch.bfloat16), None, None, 1e-6)


KERNELS = [linear, single_pass, online, layer_norm]


@pytest.mark.parametrize("make", KERNELS)
def test_the_bits_depend_neither_on_the_order_of_warps_nor_on_when_copies_land(make):
    torch.manual_seed(1)
    launch, out = make()
    answers = []
    for order, early_copies in itertools.product(ORDERS, (False, True)):
        out.fill_(float("nan"))
        run(launch, order=order, early_copies=early_copies)
        answers.append(out.clone())
    assert answers[0].isfinite().all()
    assert all(torch.equal(other, answers[0]) for other in answers[1:])


def mutants(ptx: str, pattern: str, weaker: str) -> list[str]:
    """The text with each match of the pattern, one at a time, replaced."""
    return [ptx[: m.start()] + m.expand(weaker) + ptx[m.end() :] for m in re.finditer(pattern, ptx)]


@pytest.mark.parametrize("make", [linear, online])
def test_a_wait_weakened_by_one_is_caught(make):
    """The wait in the loop; the one behind it only sees to it that nothing is on its way when the kernel goes on."""
    launch, _ = make()
    ptx = compiled_for(launch, 80).ptx
    count = int(re.search(r"cp\.async\.wait_group\s+(\d+)", ptx)[1])
    (weaker,) = mutants(ptx, rf"cp\.async\.wait_group\s+{count};", f"cp.async.wait_group {count + 1};")
    run(launch, ptx=ptx)
    with pytest.raises(EmulationError, match=r"kernel: ldmatrix\S* .*: load of bytes that a copy is still writing"):
        run(launch, ptx=weaker)


# How many barriers separate nothing that another one, or the start of the kernel, does not separate as well.
@pytest.mark.parametrize(("make", "redundant"), [(linear, 1), (single_pass, 1), (online, 2), (layer_norm, 0)])
def test_a_dropped_barrier_is_a_race(make, redundant):
    torch.manual_seed(1)
    launch, out = make()
    run(launch)
    expected, caught = out.clone(), []
    barrierless = mutants(compiled_for(launch, 80).ptx, r"bar\.sync\s+0;", "")
    assert len(barrierless) >= 4
    for ptx in barrierless:
        try:
            run(launch, ptx=ptx)
        except EmulationError as error:
            caught.append(str(error))
        else:
            assert torch.equal(out, expected)
    assert len(barrierless) - len(caught) == redundant
    assert all(re.search(r"_kernel: \S+ .*: race: .*, at shared address 0x", error) for error in caught)


def test_rows_outside_a_view_are_neither_loaded_nor_stored():
    """Also where the memory is there."""
    launch, y = linear()
    x = launch.arguments["x_ptr"]
    for name, view, message in (("x_ptr", x[:99], "load of 16 bytes"), ("y_ptr", y[:99], "store of 16 bytes")):
        given = dataclasses.replace(launch, arguments=launch.arguments | {name: view})
        with pytest.raises(EmulationError, match=rf"_linear_kernel: .*{message} outside .* of {name}"):
            run(given)


def test_an_unknown_instruction_raises():
    launch, _ = layer_norm()
    ptx = compiled_for(launch, 80).ptx
    with pytest.raises(EmulationError, match=r"_layer_norm_kernel: rsqrt.rn.f64 .* float32 only"):
        run(launch, ptx=ptx.replace("rsqrt.approx.ftz.f32", "rsqrt.rn.f64"))
    with pytest.raises(EmulationError, match=r"_layer_norm_kernel: rsqrtt.approx.ftz.f32 .*: unknown instruction"):
        run(launch, ptx=ptx.replace("rsqrt.", "rsqrtt."))


def test_what_every_kernel_stores_to_is_said():
    assert {launch.kernel.__name__ for launch in launches()} == set(OUTPUTS)
