"""The opsets that ONNX files can be written in, and what older ones lack.

The IR version is the one that the ONNX release of that opset introduced (onnx, `docs/Versioning.md`), except for opset
20, which is written with IR 10, not 9.
"""

from dvit_infer.errors import InputError

IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 10, 21: 10}
DEFAULT = 20


def check_opset(opset: int) -> int:
    """Return the opset if it can be written; LayerNormalization exists from 17 on."""
    if type(opset) is not int or opset not in IR_VERSIONS:
        raise InputError(f"opset: {opset!r}; {min(IR_VERSIONS)} to {max(IR_VERSIONS)} can be written")
    return opset


def has_gelu(opset: int) -> bool:
    return opset >= 20


def axes_are_input(opset: int) -> bool:
    """Return whether ReduceMean and ReduceMax take their axes as an input; before, as an attribute."""
    return opset >= 18


def has_num_outputs(opset: int) -> bool:
    """Return whether Split states the number of its outputs; before, it counts them."""
    return opset >= 18


def needs_norm_bias(opset: int) -> bool:
    """Return whether LayerNormalization gets a bias of zeros.

    It is optional, but without it ONNX Runtime 1.15 to 1.18 abort while they fuse a residual's addition with the norm.
    The opsets for those versions are written with it.
    """
    return opset < 20
