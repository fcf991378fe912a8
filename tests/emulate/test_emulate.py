"""kernels/emulate refuses what a kernel must not do: accesses, races, unknown instructions, lanes that never meet."""

import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT
from emulate.errors import EmulationError
from emulate.schedule import ORDERS
from ptx_kernels import compute, run_ptx

THREADS = np.arange(32, dtype=np.uint32)
TO_OUT = "add.s64 %rd20, %rd0, %rd11;"  # this lane's element of the first array


def test_it_is_not_packaged():
    code = "import setuptools, distutils.core as d; print(*d.run_setup('setup.py', stop_after='init').packages)"
    packages = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "dvit_kernels" in packages.split()
    assert not [name for name in packages.split() if "emulate" in name]


def test_lanes_load_compute_and_store():
    out = run_ptx(
        TO_OUT
        + "add.s64 %rd21, %rd1, %rd11; ld.global.b32 %r9, [%rd21]; add.s32 %r9, %r9, %r0; st.global.b32 [%rd20], %r9;",
        np.zeros(32, np.uint32),
        THREADS * 100,
    )
    assert out.tolist() == [101 * i for i in range(32)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "add.s64 %rd20, %rd1, %rd11; ld.global.b32 %r9, [%rd20+4];",
            "load of 4 bytes outside .* byte 128 of 128 of array 1",
        ),
        (
            "add.s64 %rd20, %rd1, %rd11; ld.global.b32 %r9, [%rd20+-4];",
            "load of 4 bytes outside .* byte -4 of 128 of array 1",
        ),
        ("add.s64 %rd20, %rd1, %rd13; ld.global.v4.b32 {%r9, %r10, %r11, %r12}, [%rd20];", "load of 16 bytes outside"),
        ("mov.b64 %rd20, 64; ld.global.b32 %r9, [%rd20];", "load of 4 bytes outside .* 0x40"),
        ("add.s64 %rd20, %rd1, %rd11; prefetch.global.L2 [%rd20+4];", "load of 1 bytes outside .* of array 1"),
        (TO_OUT + "st.global.b32 [%rd20+4], %r0;", "store of 4 bytes outside .* byte 128 of 128 of array 0"),
        ("add.s64 %rd20, %rd1, %rd11; st.global.b32 [%rd20], %r0;", "store of 4 bytes outside .* of array 1"),
        ("add.s64 %rd20, %rd1, %rd11; ld.global.b32 %r9, [%rd20+2];", "misaligned load of 4 bytes"),
        ("ld.global.v2.b32 {%r9, %r10}, [%rd1+4];", "misaligned load of 8 bytes"),
        (TO_OUT + "st.global.b32 [%rd20+1], %r0;", "misaligned store of 4 bytes"),
        ("ld.shared.b32 %r9, [%r1+1];", "misaligned load of 4 bytes at shared address 0x1"),
        ("st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};", "misaligned store of 16 bytes at shared address 0x4"),
        ("ld.shared.b32 %r9, [%r2];", "load of 4 bytes outside, at shared address 0x80 of 128 bytes"),
        ("st.shared.b32 [%r1+4], %r0;", "store of 4 bytes outside, at shared address 0x80 of 128 bytes"),
        ("ld.shared.b32 %r9, [%r1+-8];", "load of 4 bytes outside"),
        ("cp.async.cg.shared.global [%r3], [%rd1], 0x10;", "copy of 16 bytes outside, at shared address 0x80"),
        ("cp.async.ca.shared.global [%r1], [%rd1+128], 0x4;", "load of 4 bytes outside"),
    ],
)
def test_accesses_are_checked(body, message):
    """The error names the kernel, the instruction and the address."""
    with pytest.raises(EmulationError, match=f"small: .*{message}") as raised:
        run_ptx(body, np.zeros(32, np.uint32), np.zeros(32, np.uint32), shared=128)
    assert body.split(";")[-2].strip() in str(raised.value)


def test_predicated_lanes_access_nothing():
    out = run_ptx(
        TO_OUT + "setp.lt.u32 %p1, %r0, 8; mov.b32 %r9, 7; @%p1 ld.global.b32 %r9, [%rd1]; st.global.b32 [%rd20], %r9;"
        "setp.gt.u32 %p2, %r0, 100; @%p2 st.global.b32 [%rd1], %r9;",
        np.zeros(32, np.uint32),
        np.full(1, 5, np.uint32),
    )
    assert out.tolist() == [5] * 8 + [7] * 24


def test_shared_memory_is_nan_at_first():
    out = run_ptx(
        TO_OUT + "ld.shared.b32 %r9, [%r1]; st.global.b32 [%rd20], %r9;", np.zeros(32, np.float32), shared=128
    )
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %r9, %r0;", "frobnicate.b32 %r9, %r0: unknown instruction"),
        ("add.sat.s32 %r9, %r0, %r0;", "unknown modifier sat"),
        ("ld.local.b32 %r9, [%r0];", "unknown instruction"),
        ("cvt.rz.f32.u32 %r9, %r0;", "unknown modifier rz"),
        ("atom.global.add.u32 %r9, [%rd0], 1;", "unknown instruction"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r9}, {%r9}, {%r9}, {%r9};", "unknown instruction"),
        ("bra.uni nowhere;", "no label nowhere"),
        ("bar.sync 1;", "only barrier 0"),
        ("mov.b32 %r9, %clock;", "%clock is unknown"),
    ],
)
def test_unknown_instructions_raise(body, message):
    with pytest.raises(EmulationError, match=f"small: .*{message}"):
        run_ptx(body, np.zeros(32, np.uint32))


def test_an_unknown_instruction_raises_also_where_no_lane_goes():
    with pytest.raises(EmulationError, match="unknown instruction"):
        run_ptx("ret; frobnicate.b32 %r9, %r0;", np.zeros(32, np.uint32))


EXCHANGE = """
    st.shared.b32 [%r1], %r0;
    bar.sync 0;
    xor.b32 %r9, %r1, 128;
    ld.shared.b32 %r9, [%r9];
    add.s64 %rd20, %rd0, %rd11;
    st.global.b32 [%rd20], %r9;
"""


@pytest.mark.parametrize("order", ORDERS)
def test_warps_exchange_through_shared_memory(order):
    out = run_ptx(EXCHANGE, np.zeros(64, np.uint32), threads=64, shared=256, order=order)
    assert out.tolist() == [i ^ 32 for i in range(64)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_a_race_in_any_order(order):
    with pytest.raises(EmulationError, match=r"race: .* at shared address"):
        run_ptx(EXCHANGE.replace("bar.sync 0;", ""), np.zeros(64, np.uint32), threads=64, shared=256, order=order)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("together", "store over what another warp loads"),
        *((o, "load of what another warp stored") for o in ORDERS[1:]),
    ],
)
def test_storing_before_all_have_loaded_is_a_race(order, message):
    again = EXCHANGE + "st.shared.b32 [%r1], %r9;"
    with pytest.raises(EmulationError, match=f"race: {message}"):
        run_ptx(again, np.zeros(64, np.uint32), threads=64, shared=256, order=order)


COPY = """
    add.s64 %rd20, %rd1, %rd13;
    cp.async.cg.shared.global [%r3], [%rd20], 0x10;
    cp.async.commit_group;
    add.s64 %rd20, %rd20, 512;
    add.s32 %r4, %r3, 512;
    cp.async.cg.shared.global [%r4], [%rd20], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 %r9, [%r3];
    cp.async.wait_group 0;
    ld.shared.b32 %r10, [%r4];
    add.s32 %r9, %r9, %r10;
    add.s64 %rd20, %rd0, %rd11;
    st.global.b32 [%rd20], %r9;
"""


def test_warps_may_store_only_the_same_at_one_place():
    """Lanes of one warp may differ: the last one's value stays."""
    body = "st.shared.b32 [global_smem], %r0; bar.sync 0; ld.shared.b32 %r9, [global_smem];"
    body += "add.s64 %rd20, %rd0, %rd11; st.global.b32 [%rd20], %r9;"
    assert run_ptx(body, np.zeros(32, np.uint32), shared=128).tolist() == [31] * 32
    same = body.replace("%r0;", "7;")
    assert run_ptx(same, np.zeros(64, np.uint32), threads=64, shared=128).tolist() == [7] * 64
    with pytest.raises(EmulationError, match=r"race: warps store different values at one place, at shared address 0x0"):
        run_ptx(body, np.zeros(64, np.uint32), threads=64, shared=128)


@pytest.mark.parametrize("early_copies", [False, True])
def test_copies_land_at_their_wait(early_copies):
    given = np.arange(256, dtype=np.uint32)
    out = run_ptx(COPY, np.zeros(32, np.uint32), given, shared=1024, early_copies=early_copies)
    assert out.tolist() == [8 * i + 128 for i in range(32)]


@pytest.mark.parametrize("early_copies", [False, True])
@pytest.mark.parametrize("weaker", [("wait_group 1", "wait_group 2"), ("wait_group 0", "wait_group 1")])
def test_a_weakened_wait_is_caught(weaker, early_copies):
    with pytest.raises(EmulationError, match="load of bytes that a copy is still writing"):
        run_ptx(
            COPY.replace(*weaker),
            np.zeros(32, np.uint32),
            np.zeros(256, np.uint32),
            shared=1024,
            early_copies=early_copies,
        )


def test_a_copy_of_no_bytes_leaves_zeros_and_reads_nothing():
    body = "mov.b64 %rd20, 0; cp.async.cg.shared.global [%r3], [%rd20], 0x10, 0; cp.async.commit_group;"
    body += "cp.async.wait_group 0; ld.shared.b32 %r9, [%r3]; add.s64 %rd20, %rd0, %rd11; st.global.b32 [%rd20], %r9;"
    assert run_ptx(body, np.ones(32, np.uint32), shared=512).tolist() == [0] * 32


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_of_a_warp_part_and_meet(order):
    """Each lane loops as often as its number says; all of them are added up behind the loop."""
    body = """
        mov.b32 %r10, 0;
    loop:
        setp.ge.s32 %p1, %r10, %r0;
        @%p1 bra done;
        add.s32 %r10, %r10, 1;
        bra.uni loop;
    done:
        redux.sync.add.s32 %r9, %r10, -1;
        add.s64 %rd20, %rd0, %rd11;
        st.global.b32 [%rd20], %r9;
    """
    out = run_ptx(body, np.zeros(64, np.uint32), threads=64, order=order)
    assert out.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_that_never_meet_are_a_deadlock(order):
    body = "setp.eq.s32 %p1, %r0, 0; @%p1 bra other; bar.sync 0; ret; other: bar.sync 0;"
    with pytest.raises(EmulationError, match=r"deadlock: lanes wait at bar\.sync 0 and bar\.sync 0"):
        run_ptx(body, np.zeros(64, np.uint32), threads=64, order=order)


def test_a_warp_cannot_shuffle_without_some_of_its_lanes():
    body = "setp.lt.s32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;"
    with pytest.raises(EmulationError, match="some lanes of 32 do not execute it"):
        run_ptx(body, np.zeros(32, np.uint32))


def test_names_in_braces_belong_to_them():
    one = """
    {
        .reg .pred complete;
        mov.b32 %r9, 0;
    again:
        add.s32 %r9, %r9, 1;
        setp.ge.s32 complete, %r9, 3;
        @!complete bra.uni again;
    }
    """
    assert compute(one + one, THREADS).tolist() == [3] * 32
