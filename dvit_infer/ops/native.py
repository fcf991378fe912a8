"""prune_tokens in the native library, libdvit_kernels (kernels/csrc): find, check and call it through ctypes.

The library is in the package dvit_kernels if that was installed with DVIT_NATIVE=1. DVIT_NATIVE_LIBRARY names one
that CMake built elsewhere, and takes precedence.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dvit_infer import __version__
from dvit_infer.errors import InputError
from dvit_infer.utils.threads import num_threads

FILE = "libdvit_kernels.so"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum dvit_dtype
_INVALID = (1, 2)  # DVIT_INVALID, DVIT_UNSUPPORTED


class _Tokens(ctypes.Structure):
    """struct dvit_tokens."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "prefix", "tokens", "channels", "keep")),
        *((name, ctypes.c_int64) for name in ("batch_stride", "token_stride")),
    )


class _Predictor(ctypes.Structure):
    """struct dvit_predictor, in the order of `pack_predictor`."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("w1", "w1_sum", "b1", "w2_own", "w2_mean", "b2", "w3", "b3", "w4", "b4")
    )


def library() -> ctypes.CDLL:
    """Return the library, loaded once.

    Raises:
        InputError: it does not exist, cannot be loaded, or has another version.
    """
    return _load(str(Path(os.environ.get("DVIT_NATIVE_LIBRARY") or _packaged()).resolve()))


def supports(device: torch.device, n: int, c: int) -> bool:
    """Return whether the library supports N patch tokens with C channels on the device.

    Raises:
        InputError: it does not exist, or was built without CUDA and the device is a GPU.
    """
    lib = library()
    if device.type == "cpu":
        return c >= 4 and c % 2 == 0
    if device.type == "cuda" and not lib.dvit_has_cuda():
        raise InputError(
            f"DVIT_PRUNE: native was requested on {device}, but the library was built without CUDA; build it with nvcc"
        )
    return device.type == "cuda" and n <= 4096 and 64 <= c <= 1024 and c % 32 == 0


def prune_tokens(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::prune_tokens` on x's device: a CPU, with `num_threads`, or a GPU, on its current stream.

    Args:
        x: (B, P+N, C) tokens of a supported size (`supports`); a last stride other than 1 costs a copy.
        packed: what `pack_predictor` returned for x.dtype, on x's device.
        num_keep: the number of the N patch tokens to keep, 1 to N.
        num_prefix: the number P of leading tokens, always kept.
        eps: of the predictor's LayerNorm.

    Returns:
        kept_x (B, P+num_keep, C) and index (B, num_keep) int64, as `dvit::prune_tokens`.

    Raises:
        InputError: the library does not exist.
        ValueError: the library rejects the arguments.
        RuntimeError: CUDA failed.
    """
    lib = library()
    x = x if x.stride(2) == 1 else x.contiguous()
    packed = [t.contiguous() for t in packed]
    b, tokens, c = x.shape
    shape = _Tokens(_DTYPES[x.dtype], b, num_prefix, tokens - num_prefix, c, num_keep, x.stride(0), x.stride(1))
    predictor = _Predictor(*(t.data_ptr() for t in packed))
    kept_x = x.new_empty(b, num_prefix + num_keep, c)
    index = x.new_empty(b, num_keep, dtype=torch.int64)
    given = ctypes.byref(shape), ctypes.byref(predictor), eps, x.data_ptr(), kept_x.data_ptr(), index.data_ptr()
    needed = ctypes.c_size_t()
    if x.device.type == "cpu":
        threads = num_threads()
        _check(lib, lib.dvit_prune_tokens_workspace(given[0], threads, ctypes.byref(needed)))
        workspace = x.new_empty(needed.value, dtype=torch.uint8)
        _check(lib, lib.dvit_prune_tokens(*given, workspace.data_ptr(), needed, threads))
        return kept_x, index
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _check(lib, lib.dvit_cuda_prune_tokens_workspace(given[0], ctypes.byref(needed)))
        workspace = x.new_empty(needed.value, dtype=torch.uint8)
        _check(lib, lib.dvit_cuda_prune_tokens(*given, workspace.data_ptr(), needed, stream))
    return kept_x, index


def _packaged() -> str:
    spec = importlib.util.find_spec("dvit_kernels")
    folders = spec.submodule_search_locations if spec is not None else None
    return str(Path(next(iter(folders), ".")) / FILE) if folders else FILE


@functools.cache
def _load(path: str) -> ctypes.CDLL:
    if not Path(path).is_file():
        raise InputError(
            f"DVIT_PRUNE: native was requested, but {path} does not exist; install with DVIT_NATIVE=1 pip install ., "
            "or build the library with cmake and name it in DVIT_NATIVE_LIBRARY"
        )
    try:
        lib = ctypes.CDLL(path)
        lib.dvit_version.restype = ctypes.c_char_p
        version = lib.dvit_version().decode()
    except (OSError, AttributeError) as error:
        raise InputError(f"DVIT_PRUNE: native was requested, but {path} cannot be used: {error}") from None
    if version != __version__:
        raise InputError(
            f"DVIT_PRUNE: native was requested, but {path} has version {version}, not {__version__}; rebuild it"
        )
    pointer, threads, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    lib.dvit_last_error.restype = ctypes.c_char_p
    prune = (pointer, pointer, ctypes.c_float, pointer, pointer, pointer, pointer, size)
    lib.dvit_prune_tokens.argtypes = [*prune, threads]
    lib.dvit_prune_tokens_workspace.argtypes = [pointer, threads, pointer]
    lib.dvit_cuda_prune_tokens.argtypes = [*prune, pointer]
    lib.dvit_cuda_prune_tokens_workspace.argtypes = [pointer, pointer]
    return lib


def _check(lib: ctypes.CDLL, status: int) -> None:
    if status:
        message = f"prune_tokens by the native library: {lib.dvit_last_error().decode()}"
        raise ValueError(message) if status in _INVALID else RuntimeError(message)
