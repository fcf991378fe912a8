"""Tensor copies in kernels/emulate: blocks of a matrix to shared memory, and the mbarriers that say they are there."""

import numpy as np
import pytest
from emulate.errors import EmulationError
from emulate.schedule import ORDERS
from emulate.tensors import TensorMap
from ptx_kernels import run_ptx

generator = np.random.default_rng(7)
MATRIX = np.arange(1, 20 * 72 + 1, dtype=np.uint16).reshape(
    20, 72
)  # rows of 144 bytes, 70 of their 72 elements described
ROWS = 16  # of a block


def tensor_map(width: int, swizzled: bool = True):
    """Blocks of ROWS rows of `width` bytes of the second array."""
    return lambda addresses: TensorMap(addresses[1], (20, 70), 72, (ROWS, width // 2), 2, width if swizzled else 0)


# A block at column %r10 and row %r11, by one lane; everybody waits, and copies shared memory to the result.
LOAD = """
    mov.b64 %rd20, small_param_2;
    cvta.param.u64 %rd21, %rd20;
    mov.b32 %r20, 4096;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r20], 1;
    bar.sync 0;
    mov.b32 %r10, COLUMN; mov.b32 %r11, ROW;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], BYTES;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [global_smem], [%rd21, {%r10, %r11}], [%r20];
    { .reg .pred complete; again:
      mbarrier.try_wait.parity.shared::cta.b64 complete, [%r20], 0;
      @!complete bra.uni again; }
    past:
    ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r3];
    add.s64 %rd22, %rd0, %rd13;
    st.global.v4.b32 [%rd22], {%r12, %r13, %r14, %r15};
"""


def loaded(width: int, column: int = 0, row: int = 0, swizzled: bool = True, change=("", ""), **options) -> np.ndarray:
    body = LOAD.replace("COLUMN", str(column)).replace("ROW", str(row)).replace("BYTES", str(ROWS * width))
    out, maps = np.zeros(1024, np.uint16), (tensor_map(width, swizzled),)
    return run_ptx(body.replace(*change), out, MATRIX, threads=128, shared=4104, maps=maps, **options)


@pytest.mark.parametrize("early_copies", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_block_of_a_matrix_is_copied(width, swizzled, order, early_copies):
    """With zeros beyond the last row and column; pieces of 16 bytes where the swizzle puts them."""
    for column, row in ((0, 0), (48, 3), (64, 8)):
        got = loaded(width, column, row, swizzled, order=order, early_copies=early_copies)
        block = np.zeros((ROWS, width // 2), np.uint16)
        part = MATRIX[row : row + ROWS, column : min(column + width // 2, 70)]
        block[: len(part), : part.shape[1]] = part
        for r in range(ROWS):
            for piece in range(width // 16):
                place = piece ^ (r % 8 // (128 // width)) if swizzled else piece
                at = r * width // 2 + place * 8
                assert got[at : at + 8].tolist() == block[r, 8 * piece : 8 * piece + 8].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("@!complete bra.uni again;", ""), "still writing"),  # try_wait may give up
        ((", 2048;", ", 1024;"), "deadlock: lanes wait at mbarrier.try_wait"),
        (("@%p1 mbarrier.arrive", "@!%p1 mbarrier.arrive"), "has all its arrivals"),
        (
            ("mbarrier.try_wait.parity.shared::cta.b64 complete, [%r20], 0;", "setp.eq.s32 complete, 0, 0;"),
            "still writing",
        ),
        (("[%r20], 0;", "[%r20], 1;"), "still writing"),  # the phase before has always ended
        (("mov.b32 %r20, 4096;", "mov.b32 %r20, 4104;"), "mbarrier of 8 bytes outside"),
        (("@%p1 mbarrier.init.shared::cta.b64 [%r20], 1;", ""), "there is no mbarrier at shared address 0x1000"),
        (("bar.sync 0;", ""), "race: load of what another warp stored"),
        (("[global_smem], [%rd21", "[global_smem+64], [%rd21"), "misaligned block at shared address 0x40"),
        (("cvta.param.u64 %rd21, %rd20;", "mov.b64 %rd21, %rd1;"), "is no parameter's address"),
    ],
)
def test_what_a_tensor_copy_must_not_do(change, message):
    with pytest.raises(EmulationError, match=f"small: .*{message}"):
        loaded(128, change=change)


def test_elements_outside_the_argument_are_not_copied():
    """What the map describes has to be there as well."""
    big = lambda addresses: TensorMap(addresses[1], (40, 72), 72, (ROWS, 64), 2, 128)  # noqa: E731
    body = LOAD.replace("COLUMN", "0").replace("ROW", "16").replace("BYTES", "2048")
    with pytest.raises(EmulationError, match=r"load of 2 bytes outside .* of array 1"):
        run_ptx(body, np.zeros(1024, np.uint16), MATRIX, threads=128, shared=4104, maps=(big,))


@pytest.mark.parametrize(
    ("address", "stride", "block", "swizzle"),
    [(8, 72, (16, 64), 128), (16, 71, (16, 64), 128), (16, 72, (16, 64), 64), (16, 72, (512, 64), 128)],
)
def test_maps_that_the_driver_refuses(address, stride, block, swizzle):
    with pytest.raises(EmulationError, match="a tensor map"):
        TensorMap(address, (20, 70), stride, block, 2, swizzle)


def test_one_lane_of_a_warp_is_elected():
    body = "elect.sync %r9|%p1, -1; selp.b32 %r9, 1, 0, %p1; add.s64 %rd20, %rd0, %rd11; st.global.b32 [%rd20], %r9;"
    out = run_ptx(body, np.zeros(64, np.uint32), threads=64)
    assert out.reshape(2, 32).sum(axis=1).tolist() == [1, 1]


# Every lane stores its 16 bytes of the second array to shared memory, one lane then a block of that to the result.
STORE = """
    mov.b64 %rd20, small_param_2;
    add.s64 %rd21, %rd1, %rd13;
    ld.global.v4.b32 {%r12, %r13, %r14, %r15}, [%rd21];
    st.shared.v4.b32 [%r3], {%r12, %r13, %r14, %r15};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.eq.s32 %p1, %r0, 0;
    mov.b32 %r10, 48; mov.b32 %r11, 8;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd20, {%r10, %r11}], [global_smem];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
"""


def stored(width: int, change=("", ""), **options) -> tuple[np.ndarray, np.ndarray]:
    """The result, and what went to shared memory."""
    given = np.arange(1, 1025, dtype=np.uint16)
    into = lambda addresses: TensorMap(addresses[0], (20, 70), 72, (ROWS, width // 2), 2, width)  # noqa: E731
    body = STORE.replace(*change)
    return run_ptx(body, np.zeros((20, 72), np.uint16), given, threads=128, shared=2048, maps=(into,), **options), given


@pytest.mark.parametrize("early_copies", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_block_is_stored_into_a_matrix(width, order, early_copies):
    """What of it lies outside the matrix is not."""
    out, given = stored(width, order=order, early_copies=early_copies)
    expected = np.zeros((20, 72), np.uint16)
    for r in range(20 - 8):
        for c in range(min(70 - 48, width // 2)):
            piece = c // 8 ^ r % 8 // (128 // width)
            expected[8 + r, 48 + c] = given[r * width // 2 + piece * 8 + c % 8]
    assert (out == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fence.proxy.async.shared::cta;", ""), "no fence of its proxy since"),
        (("bar.sync 0;", ""), "race: asynchronous read of what another warp just stored"),
        (("cp.async.bulk.wait_group.read 0;", ""), "ends while tensor copies read its shared memory"),
        (("cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group.read 1;"), "ends while tensor copies read"),
        (("cp.async.bulk.commit_group;", ""), "ends while tensor copies read its shared memory"),
        (
            ("cp.async.bulk.wait", "bar.sync 0; st.shared.b32 [%r1], %r0; cp.async.bulk.wait"),
            "written over what was still",
        ),
        (("cp.async.bulk.wait", "st.shared.b32 [%r1], %r0; cp.async.bulk.wait"), "race: store over what another warp"),
        (("%rd20, small_param_2", "%rd20, small_param_1"), "is no tensor map's address"),
    ],
)
def test_what_a_store_of_a_block_must_not_do(change, message):
    with pytest.raises(EmulationError, match=f"small: .*{message}"):
        stored(128, change)
