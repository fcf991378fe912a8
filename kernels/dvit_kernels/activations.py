"""Activations inside a kernel, in float32.

GELU is there by erf to the last bit, by a polynomial of erf, and in its tanh form.
"""

import torch
import triton
import triton.language as tl

# The cheapest form whose error is below the rounding error of the dtype it is stored in.
CHEAPEST_GELU = {torch.float32: "gelu", torch.float16: "gelu_poly", torch.bfloat16: "gelu_tanh"}


@triton.jit
def gelu_erf(x):
    """0.5 x (1 + erf(x / sqrt(2))), with the device library's erf: 32 instructions per element on sm_90."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def gelu_poly(x):
    """GELU with erf by Abramowitz and Stegun 7.1.26: an error of at most 2.1e-7, 21 instructions.

    It is for finite numbers: infinity gives NaN.
    """
    t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    poly = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    missing = poly * tl.math.exp2(x * x * -0.7213475204444817)  # 1 - erf(|x| / sqrt(2))
    return tl.maximum(x, 0.0) - tl.abs(0.5 * x) * missing


@triton.jit
def gelu_exact(x, dtype: tl.constexpr):
    """GELU to float32 precision; for a narrower `dtype` the polynomial, whose error is at most one last place."""
    if dtype == tl.float32:
        y = gelu_erf(x)
    else:
        y = gelu_poly(x)
    return y


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which is x times a sigmoid: an error of at most 4.8e-4."""
    return x / (1.0 + tl.math.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))


@triton.jit
def gelu_tanh_approx(x):
    """The tanh form with the GPU's tanh instruction, whose relative error is at most 2^-11.

    It takes 6 instructions, one of them in the special-function unit; `gelu_tanh` takes 10, two of them there.
    """
    inner = x * (0.7978845608 + 0.0356774081 * x * x)
    tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1)
    half = 0.5 * x
    return half + half * tanh


@triton.jit
def silu(x, STEEPNESS: tl.constexpr):
    """x times the sigmoid of STEEPNESS * x: 1 for SiLU, 1.702 for CLIP's quick GELU."""
    return x / (1.0 + tl.math.exp2(x * (-1.4426950408889634 * STEEPNESS)))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply `ACTIVATION`: none, gelu (erf), gelu_poly, gelu_tanh, gelu_tanh_approx, quick_gelu or silu."""
    if ACTIVATION == "gelu":
        x = gelu_erf(x)
    elif ACTIVATION == "gelu_poly":
        x = gelu_poly(x)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "gelu_tanh_approx":
        x = gelu_tanh_approx(x)
    elif ACTIVATION == "quick_gelu":
        x = silu(x, 1.702)
    elif ACTIVATION == "silu":
        x = silu(x, 1.0)
    return x
