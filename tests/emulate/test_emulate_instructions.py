"""What the instructions of kernels/emulate compute, against NumPy."""

import numpy as np
import pytest
from ptx_kernels import compute, run_ptx

generator = np.random.default_rng(5)
WORDS = generator.integers(0, 2**32, (3, 64), dtype=np.uint32)
WORDS[0, :6] = 0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 5
WORDS[1, :6] = 3, 0xFFFFFFFF, 0xFFFFFFFF, 3, 0x80000000, 0xFFFFFFFE
A, B, C = WORDS
SIGNED_A, SIGNED_B = A.view(np.int32).astype(np.int64), B.view(np.int32).astype(np.int64)
WIDE_A, WIDE_B = A.astype(np.uint64), B.astype(np.uint64)

POSITIVE = (SIGNED_A >= 0) & (SIGNED_B >= 0)
UPPER = "shr.u64 %rd20, %rd20, 32; cvt.u32.u64 %r9, %rd20;"


def low(x: np.ndarray) -> np.ndarray:
    return (x & 0xFFFFFFFF).astype(np.uint32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r9, %r10, %r11;", A + B),
        ("sub.s32 %r9, %r10, %r11;", A - B),
        ("mul.lo.s32 %r9, %r10, %r11;", A * B),
        ("mad.lo.s32 %r9, %r10, %r11, %r12;", A * B + C),
        ("mul.hi.u32 %r9, %r10, %r11;", (WIDE_A * WIDE_B >> np.uint64(32)).astype(np.uint32)),
        ("mul.hi.s32 %r9, %r10, %r11;", low(SIGNED_A * SIGNED_B >> 32)),
        ("mul.wide.s32 %rd20, %r10, %r11; cvt.u32.u64 %r9, %rd20;", low(SIGNED_A * SIGNED_B)),
        ("mul.wide.s32 %rd20, %r10, %r11;" + UPPER, low(SIGNED_A * SIGNED_B >> 32)),
        ("div.s32 %r9, %r10, %r11;", low(np.trunc(SIGNED_A / SIGNED_B).astype(np.int64))),
        ("rem.s32 %r9, %r10, %r11;", low(np.fmod(SIGNED_A, SIGNED_B))),
        ("div.u32 %r9, %r10, %r11;", A // B),
        ("min.s32 %r9, %r10, %r11;", low(np.minimum(SIGNED_A, SIGNED_B))),
        ("max.u32 %r9, %r10, %r11;", np.maximum(A, B)),
        ("neg.s32 %r9, %r10;", -A),
        ("and.b32 %r9, %r10, %r11;", A & B),
        ("xor.b32 %r9, %r10, -1;", ~A),
        ("not.b32 %r9, %r10;", ~A),
        ("popc.b32 %r9, %r10;", np.bitwise_count(A)),
        ("lop3.b32 %r9, %r10, %r11, %r12, 0xCA;", A & B | ~A & C),
        ("shl.b32 %r9, %r10, 5;", A << np.uint32(5)),
        ("shl.b32 %r9, %r10, 32;", 0 * A),
        ("shr.u32 %r9, %r10, 40;", 0 * A),
        ("shr.s32 %r9, %r10, 40;", low(SIGNED_A >> 63)),
        ("bfe.u32 %r9, %r10, 4, 14;", A >> np.uint32(4) & np.uint32(0x3FFF)),
        ("bfe.s32 %r9, %r10, 3, 1;", np.where(A >> 3 & 1, 0xFFFFFFFF, 0)),
        ("prmt.b32 %r9, %r10, %r11, 0x7531;", A >> 8 & 0xFF | A >> 16 & 0xFF00 | B << 8 & 0xFF0000 | B & 0xFF000000),
        ("prmt.b32 %r9, %r10, %r11, 0x8888;", np.where(A & 0x80, 0xFFFFFFFF, 0)),
        ("mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r9, {%rs2, %rs1};", A << np.uint32(16) | A >> np.uint32(16)),
        ("mov.b32 {_, %rs2}, %r10; cvt.u32.u16 %r9, %rs2;", A >> np.uint32(16)),
        ("cvt.u16.u32 %rs1, %r10; cvt.s32.s16 %r9, %rs1;", low(A.astype(np.uint16).view(np.int16).astype(np.int64))),
        ("cvt.s64.s32 %rd20, %r10;" + UPPER, low(SIGNED_A >> 63)),
        ("setp.lt.s32 %p1, %r10, %r11; selp.b32 %r9, 1, 0, %p1;", (SIGNED_A < SIGNED_B)),
        ("setp.lt.u32 %p1, %r10, %r11; selp.b32 %r9, 1, 0, %p1;", A < B),
        ("setp.gt.s32 %p1, %r10, -1; setp.ge.and.s32 %p2, %r11, 0, %p1; selp.b32 %r9, 1, 0, %p2;", POSITIVE),
        ("setp.eq.b32 %p1, %r10, 5; not.pred %p1, %p1; selp.b32 %r9, 1, 0, %p1;", A != 5),
    ],
)  # fmt: skip
def test_integers(body, expected):
    with np.errstate(over="ignore"):
        assert compute(body, A, B, C).tolist() == np.asarray(expected).astype(np.uint32).tolist()


REAL = np.concatenate([[0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38], generator.normal(size=56)])
X, Y = REAL.astype(np.float32), generator.normal(size=64).astype(np.float32)
TINY = np.abs(X) < 2.0**-126
with np.errstate(all="ignore"):
    FUSED, ROOT = (X.astype(np.float64) * Y + X).astype(np.float32), 1 / np.sqrt(X)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.f32 %r9, %r10, %r11;", X + Y),
        ("fma.rn.f32 %r9, %r10, %r11, %r12;", FUSED),
        ("mul.ftz.f32 %r9, %r10, 0f3F800000;", np.where(TINY, np.copysign(0, X), X)),
        ("neg.f32 %r9, %r10;", -X),
        ("abs.f32 %r9, %r10;", np.abs(X)),
        ("max.f32 %r9, %r10, %r11;", np.fmax(X, Y)),
        ("max.NaN.f32 %r9, %r10, %r11;", np.maximum(X, Y)),
        ("min.f32 %r9, %r10, %r11;", np.fmin(X, Y)),
        ("div.full.f32 %r9, %r10, %r11;", X / Y),
        ("ex2.approx.ftz.f32 %r9, %r11;", np.exp2(Y)),
        ("rsqrt.approx.ftz.f32 %r9, %r12;", np.where(TINY, np.copysign(np.inf, X), ROOT)),
        ("cvt.rn.f32.s32 %r9, 16777219;", np.full(64, 16777220.0)),
        ("cvt.f32.f16 %r9, %rs1;", None),
        ("setp.ltu.f32 %p1, %r10, %r11; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;", ~(X >= Y)),
        ("setp.lt.f32 %p1, %r10, %r11; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;", X < Y),
        ("setp.num.f32 %p1, %r10, %r10; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;", ~np.isnan(X)),
    ],
)  # fmt: skip
def test_floating_point(body, expected):
    with np.errstate(all="ignore"):
        if expected is None:  # to half precision and back
            body, expected = "cvt.rn.f16.f32 %rs1, %r10;" + body, X.astype(np.float16).astype(np.float32)
        got = compute(body, X, Y, X, out=np.float32)
    np.testing.assert_array_equal(got, np.asarray(expected).astype(np.float32))
    assert (np.signbit(got) == np.signbit(np.asarray(expected))).all() or np.isnan(got).any()


def test_integers_of_floating_point_saturate():
    given = np.array([1.5, -1.5, 2.5, 3e9, -3e9, np.nan, np.inf, -0.5] * 4, np.float32)
    got = compute("cvt.rzi.s32.f32 %r9, %r10;", given, out=np.int32)[:8]
    assert got.tolist() == [1, -1, 2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0]
    assert compute("cvt.rni.s32.f32 %r9, %r10;", given, out=np.int32)[:3].tolist() == [2, -2, 2]


def test_bfloat16_rounds_to_even():
    given = np.array(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, np.inf, np.nan, 3.4e38, 0.0] * 4, np.float32
    )
    got = compute("cvt.rn.bf16.f32 %rs1, %r10; cvt.f32.bf16 %r9, %rs1;", given, out=np.float32)[:8]
    expected = [1, 1 + 2**-6, 1 + 2**-7, -1, np.inf, np.nan, np.inf, 0]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
    pair = compute("cvt.rn.bf16x2.f32 %r9, %r10, %r11;", given, np.roll(given, 1))
    single = compute("cvt.rn.bf16.f32 %rs1, %r10; cvt.u32.u16 %r9, %rs1;", given)
    assert (pair == (single << 16 | np.roll(single, 1))).all()


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs_of_halves(kind):
    """Sums and products of small integers, which halves hold exactly."""
    a, b, c = generator.integers(-9, 10, (3, 32, 2)).astype(np.float32)

    def bits(x: np.ndarray) -> np.ndarray:
        halves = x.astype(np.float16).view(np.uint16) if kind == "f16x2" else x.view(np.uint32) >> 16
        return np.ascontiguousarray(halves).astype(np.uint16).view(np.uint32)[:, 0]

    given = bits(a), bits(b), bits(c)
    assert (compute(f"add.{kind} %r9, %r10, %r11;", *given) == bits(a + b)).all()
    assert (compute(f"mul.rn.{kind} %r9, %r10, %r11;", *given) == bits(a * b)).all()
    assert (compute(f"fma.rn.{kind} %r9, %r10, %r11, %r12;", *given) == bits(a * b + c)).all()
    assert (compute(f"max.{kind} %r9, %r10, %r11;", *given) == bits(np.maximum(a, b))).all()


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("shfl.sync.bfly.b32 %r9, %r10, 5, 31, -1;", lambda i: i ^ 5),
        ("shfl.sync.idx.b32 %r9, %r10, 7, 31, -1;", lambda i: i // 32 * 32 + 7),
        ("shfl.sync.up.b32 %r9, %r10, 3, 0, -1;", lambda i: i - 3 if i % 32 >= 3 else i),
        ("shfl.sync.down.b32 %r9, %r10, 3, 31, -1;", lambda i: i + 3 if i % 32 < 29 else i),
        ("shfl.sync.bfly.b32 %r9, %r10, 5, 6175, -1;", lambda i: i ^ 5),  # within segments of 8 lanes
    ],
)
def test_shuffles(body, source):
    assert compute(body, A).tolist() == [A[source(i)] for i in range(64)]


@pytest.mark.parametrize(("name", "reduce"), [("add", np.sum), ("min", np.min), ("max", np.max)])
def test_reductions_of_a_warp(name, reduce):
    given = generator.integers(-99, 99, 64).astype(np.int32)
    got = compute(f"redux.sync.{name}.s32 %r9, %r10, -1;", given, out=np.int32)
    assert got.tolist() == np.repeat([reduce(half) for half in given.reshape(2, 32)], 32).tolist()


def test_loads_extend_the_sign_of_signed_types():
    body = "cvt.u64.u32 %rd20, %r0; add.s64 %rd20, %rd1, %rd20; ld.global.s8 %r9, [%rd20]; add.s64 %rd20, %rd0, %rd11;"
    given = np.arange(-16, 16).astype(np.int8)
    assert run_ptx(body + "st.global.b32 [%rd20], %r9;", np.zeros(32, np.int32), given).tolist() == given.tolist()


@pytest.mark.parametrize("trans", [False, True])
def test_matrices_are_loaded_and_stored(trans):
    """Four 8 x 8 matrices from global to shared memory to registers; back by stmatrix they are as they were."""
    suffix = ".trans" if trans else ""
    body = f"""
        add.s64 %rd20, %rd1, %rd13;
        cp.async.cg.shared.global [%r3], [%rd20], 0x10;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r3];
        stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r3+512], {{%r10, %r11, %r12, %r13}};
        ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r3+512];
        add.s64 %rd20, %rd0, %rd13;
        st.global.v4.b32 [%rd20], {{%r10, %r11, %r12, %r13}};
        st.global.v4.b32 [%rd20+512], {{%r14, %r15, %r16, %r17}};
    """
    matrices = generator.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = run_ptx(body, np.zeros((2, 32, 4, 2), np.uint16), matrices, shared=1024)
    expected = matrices.swapaxes(1, 2) if trans else matrices
    for lane in range(32):
        for matrix in range(4):
            row, col = lane // 4, 2 * (lane % 4)
            assert out[0, lane, matrix].tolist() == expected[matrix, row, col : col + 2].tolist()
    assert (out[1].reshape(4, 8, 8) == matrices).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_products_of_matrices(kind):
    """Small integers, so that any order of summation gives the same; the layout of registers as in the PTX ISA."""
    a, b = (generator.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    c = generator.integers(-8, 9, (16, 8)).astype(np.float32)
    a_lanes, b_lanes, c_lanes = np.zeros((32, 4, 2)), np.zeros((32, 2, 2)), np.zeros((32, 4))
    for lane in range(32):
        row, col = lane // 4, 2 * (lane % 4)
        for j in (0, 1):
            a_lanes[lane, :, j] = a[row, col + j], a[row + 8, col + j], a[row, col + j + 8], a[row + 8, col + j + 8]
            b_lanes[lane, :, j] = b[col + j, row], b[col + j + 8, row]
        c_lanes[lane] = c[row, col], c[row, col + 1], c[row + 8, col], c[row + 8, col + 1]

    def bits(x: np.ndarray) -> np.ndarray:
        if kind == "f16":
            return x.astype(np.float16).view(np.uint16)
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    body = f"""
        add.s64 %rd20, %rd1, %rd13; ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd20];
        add.s64 %rd20, %rd2, %rd12; ld.global.v2.b32 {{%r14, %r15}}, [%rd20];
        add.s64 %rd20, %rd3, %rd13; ld.global.v4.b32 {{%r16, %r17, %r18, %r19}}, [%rd20];
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
            {{%r16, %r17, %r18, %r19}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
        add.s64 %rd20, %rd0, %rd13; st.global.v4.b32 [%rd20], {{%r16, %r17, %r18, %r19}};
    """
    given = bits(a_lanes), bits(b_lanes), c_lanes.astype(np.float32)
    out = run_ptx(body, np.zeros((32, 4), np.float32), *given)
    expected = a @ b + c
    for lane in range(32):
        row, col = lane // 4, 2 * (lane % 4)
        assert out[lane].tolist() == [*expected[row, col : col + 2], *expected[row + 8, col : col + 2]]
