"""Products of a warpgroup (wgmma) in kernels/emulate: where operands and results are, and what comes before what."""

import numpy as np
import pytest
from emulate.errors import EmulationError
from emulate.schedule import ORDERS
from ptx_kernels import run_ptx

generator = np.random.default_rng(7)
N = 24  # columns of a product
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # mode in a descriptor
A_AT, B_AT, SHARED = 0, 16384, 32768


def laid_out(matrix: np.ndarray, width: int, transposed: bool) -> tuple[np.ndarray, int]:
    """Bytes of (rows, 16) in shared memory, and a descriptor but for its start.

    Patterns of 8 rows follow each other in the direction of the rows, then of the inner places; where a pattern is
    wider than there is to fill, the rest of it stays NaN.
    """
    rows = len(matrix)
    memory = np.full(8192, 0x7FFF, np.uint16)
    lines, along = (matrix.T, rows) if transposed else (matrix, 16)  # a line of the pattern runs along rows or inner
    span = (width or 16) // 2  # elements of a line in one pattern
    across = len(lines)
    tiles_along, tiles_across = -(-along // span), across // 8
    tile = 8 * span
    # Bytes from tile to tile along and across a line.
    step_along, step_across = (tile * 2, tile * 2 * tiles_along)
    for line in range(across):
        for place in range(along):
            t_along, t_across = place // span, line // 8
            piece = place % span // 8
            if width:
                piece ^= line % 8 // (128 // width)
            at = (t_along * step_along + t_across * step_across) // 2 + line % 8 * span + piece * 8 + place % 8
            memory[at] = lines[line, place]
    if width:
        leading, stride = step_along, step_across
    elif transposed:
        leading, stride = step_across, step_along
    else:
        leading, stride = step_along, step_across
    assert tiles_across * step_across <= memory.nbytes
    return memory, leading // 16 << 16 | stride // 16 << 32 | SWIZZLES[width] << 62


FILL = """
    mov.b32 %r10, 0;
fill:
    shl.b32 %r11, %r10, 11; add.s32 %r12, %r3, %r11;
    cvt.u64.u32 %rd20, %r12; add.s64 %rd20, %rd1, %rd20;
    ld.global.v4.b32 {%r13, %r14, %r15, %r16}, [%rd20];
    st.shared.v4.b32 [%r12], {%r13, %r14, %r15, %r16};
    add.s32 %r10, %r10, 1; setp.lt.s32 %p1, %r10, 16; @%p1 bra fill;
    mul.lo.s32 %r17, %r0, 48; cvt.u64.u32 %rd21, %r17; add.s64 %rd22, %rd2, %rd21; add.s64 %rd23, %rd0, %rd21;
"""
NAMES = [f"%r{100 + i}" for i in range(N // 2)]
LOADED = "".join(
    f"ld.global.v4.b32 {{{', '.join(NAMES[i : i + 4])}}}, [%rd22+{4 * i}];" for i in range(0, len(NAMES), 4)
)
STORED = "".join(
    f"st.global.v4.b32 [%rd23+{4 * i}], {{{', '.join(NAMES[i : i + 4])}}};" for i in range(0, len(NAMES), 4)
)
ISSUE = f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{', '.join(NAMES)}}},"


def bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def of_lanes(x: np.ndarray) -> np.ndarray:
    """(64, n) as the 128 lanes hold it, PTX ISA's figure of D."""
    lanes = np.zeros((128, x.shape[1] // 2), x.dtype)
    for lane in range(128):
        row, column = lane // 32 * 16 + lane % 32 // 4, lane % 4 * 2
        for i in range(x.shape[1] // 2):
            lanes[lane, i] = x[row + 8 * (i // 2 % 2), column + i % 2 + 8 * (i // 4)]
    return lanes


def product(
    a_width: int,
    b_width: int,
    a_transposed: bool = False,
    b_transposed: bool = False,
    added: int = 1,
    change: tuple[str, str] = ("", ""),
    **options: object,
) -> tuple[np.ndarray, np.ndarray]:
    """What a product of small integers gives, and what it should."""
    a, b = (generator.integers(-8, 9, (rows, 16)).astype(np.float32) for rows in (64, N))
    c = generator.integers(-8, 9, (64, N)).astype(np.float32)
    (a_memory, a_bits), (b_memory, b_bits) = (
        laid_out(bf16(a), a_width, a_transposed),
        laid_out(bf16(b), b_width, b_transposed),
    )
    a_bits, b_bits = (bits | at >> 4 for bits, at in ((a_bits, A_AT), (b_bits, B_AT)))
    body = f"""{FILL} {LOADED}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {ISSUE} {a_bits}, {b_bits}, {added}, 1, 1, {int(a_transposed)}, {int(b_transposed)};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        {STORED}"""
    given = np.concatenate([a_memory, b_memory])
    out = run_ptx(
        body.replace(*change),
        np.zeros((128, N // 2), np.float32),
        given,
        of_lanes(c),
        threads=128,
        shared=SHARED,
        **options,
    )
    return out, of_lanes(a @ b.T + (c if added else 0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_operands_are_where_their_descriptors_say(width, transposed):
    for given in ((width, 128, transposed, False), (128, width, False, transposed)):
        got, expected = product(*given)
        assert (got == expected).all()


@pytest.mark.parametrize("early_copies", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_product_depends_neither_on_the_order_nor_on_when_it_is_done(order, early_copies):
    for added in (0, 1):
        got, expected = product(128, 128, added=added, order=order, early_copies=early_copies)
        assert (got == expected).all()


FENCE = "wgmma.fence.sync.aligned;"
OVERWRITE = f"st.shared.b32 [%r1+{B_AT}], %r0;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((WAIT, ""), "st.global.*: %r100 is read while a product has it"),
        ((WAIT, "wgmma.wait_group.sync.aligned 1;"), "%r100 is read while a product has it"),
        (("wgmma.commit_group.sync.aligned;", ""), "%r100 is read while a product has it"),
        ((WAIT, "add.f32 %r101, %r99, %r99;" + WAIT), "%r101 is written while a product has it"),
        ((WAIT, "add.f32 %r99, %r101, %r101;" + WAIT), "%r101 is read while a product has it"),
        ((WAIT, f"bar.sync 0; {OVERWRITE}" + WAIT), "written over what was still being read asynchronously"),
        ((WAIT, OVERWRITE + WAIT), "race: store over what another warp loads"),
        (("fence.proxy.async.shared::cta;", ""), "no fence of its proxy since"),
        (("bar.sync 0;", ""), "race: asynchronous read of what another warp just stored"),
        ((FENCE, ""), "no wgmma.fence since %r10. was written"),
        ((FENCE, FENCE + "add.f32 %r103, %r103, 0f00000000;"), "no wgmma.fence since %r103 was written"),
    ],
)  # fmt: skip
def test_what_a_product_must_not_do(change, message, order):
    with pytest.raises(EmulationError, match=f"small: .*{message}"):
        product(128, 128, change=change, order=order)


def test_a_product_that_is_moved_before_its_wait_arrives_where_it_was_moved_to():
    """LLVM puts the moves of a loop's results in front of the wait behind it."""
    moved = "".join(f"mov.b32 %r{100 + i + 50}, %r{100 + i};" for i in range(N // 2))
    back = "".join(f"mov.b32 %r{100 + i}, %r{100 + i + 50};" for i in range(N // 2))
    got, expected = product(128, 128, change=(WAIT, moved + WAIT + back))
    assert (got == expected).all()
    with pytest.raises(EmulationError, match="%r150 is read while a product has it"):
        product(128, 128, change=(WAIT, moved + "add.f32 %r99, %r150, %r150;" + WAIT))


@pytest.mark.parametrize("transposed", [False, True])
def test_an_operand_may_be_in_registers_until_its_wait(transposed):
    """A as lanes hold it for mma, one warp for 16 rows; to write those registers before the wait is an error."""
    a, b = (generator.integers(-8, 9, (rows, 16)).astype(np.float32) for rows in (64, N))
    memory, bits = laid_out(bf16(b), 64, transposed)
    lanes = np.zeros((128, 4, 2), np.uint16)
    for lane in range(128):
        row, column = lane // 32 * 16 + lane % 32 // 4, lane % 4 * 2
        for i in range(4):
            at = column + 8 * (i // 2)
            lanes[lane, i] = bf16(a[row + 8 * (i % 2), at : at + 2])
    body = f"""{FILL}
        add.s64 %rd24, %rd2, %rd13; ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd24];
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {ISSUE} {{%r20, %r21, %r22, %r23}}, {bits | B_AT >> 4}, 0, 1, 1, {int(transposed)};
        wgmma.commit_group.sync.aligned;
        {WAIT}
        {STORED}"""
    given = np.zeros((128, N // 2), np.float32), np.concatenate([0 * memory, memory]), lanes
    assert (run_ptx(body, *given, threads=128, shared=SHARED) == of_lanes(a @ b.T)).all()
    with pytest.raises(EmulationError, match="%r21 is written while a product has it"):
        run_ptx(body.replace(WAIT, "cvt.rn.bf16x2.f32 %r21, %r0, %r0;" + WAIT), *given, threads=128, shared=SHARED)
