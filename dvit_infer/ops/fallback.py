"""Fallback: kernels that do not compile, launch or give correct results are replaced by PyTorch's operators.

A kernel that fails is disabled for the life of the process, with one warning. An engine checks results (`checking`):
every op then compares its kernel's result with plain PyTorch's on the same inputs, by the rule of the parity report.
The environment variable DVIT_KERNELS selects the behaviour:

    (unset)   run kernels where possible, PyTorch's operators elsewhere
    require   a kernel that cannot run or gives wrong results is an error
    off       run only PyTorch's operators
"""

import contextlib
import os
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import EllipsisType
from typing import Any, TypeVar

import torch

from dvit_infer.errors import InputError, KernelError
from dvit_infer.utils.devices import is_out_of_memory

SETTING = "DVIT_KERNELS"
REPORT = "please report this line and the output of `dvit-bench --environment` to the project"
EVERY = "every kernel"  # disabled together, by a failure that affects all

Result = TypeVar("Result")
_given_up: dict[tuple[str, str], str] = {}  # device and op -> reason
_lock = threading.Lock()
_checked: ContextVar[set[object] | None] = ContextVar("checked", default=None)  # calls compared; None: do not


def setting() -> str:
    """Return DVIT_KERNELS: '' if not set, 'require' or 'off'.

    Raises:
        InputError: it has another value.
    """
    asked = os.environ.get(SETTING, "")
    if asked not in ("", "require", "off"):
        raise InputError(f"{SETTING}: {asked!r}; require, off or nothing is expected")
    return asked


def may_run(op: str, device: torch.device) -> bool:
    """Return whether the op's kernel may be tried on the device."""
    return setting() != "off" and not {(str(device), op), (str(device), EVERY)} & _given_up.keys()


def replaced(device: torch.device) -> list[str]:
    """Return the ops whose kernels were disabled on the device, in alphabetical order."""
    return sorted(op for where, op in _given_up if where == str(device))


def by_kernel(
    op: str,
    device: torch.device,
    kernel: Callable[[], Result],
    plain: Callable[[], Result],
    fault: Callable[[Result], str | None],
    call: Sequence[object],
) -> Result:
    """Return the result of an op's kernel; if it fails, that of PyTorch's operators, now and in later calls.

    Args:
        op: the name of the op, for `may_run` and the warning.
        device: the device it runs on.
        kernel, plain: run the kernel and PyTorch's operators.
        fault: returns a description of an error in the kernel's result, or None. Called while `checking`.
        call: the op's arguments; only the first of several calls with the same sizes and settings is checked.

    Raises:
        KernelError: the kernel failed and DVIT_KERNELS is 'require', or it left the device unusable.
    """
    try:
        result = kernel()
        checked = _checked.get()
        if checked is None or (key := (op, *map(_kind, call))) in checked:
            return result
        _synchronize(device)
        reason = fault(result)
        if reason is None:
            checked.add(key)
            return result
    except KernelError:
        raise
    except Exception as error:  # compilers, linkers and drivers raise any kind
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if _is_everyones(error):
            op, reason = EVERY, _for_everyone(error)
        _require_usable(op, device, reason, error)
    _give_up(op, device, reason)
    return plain()


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Check every op's kernel inside the block, once for each combination of sizes and settings."""
    before = _checked.set(set())
    try:
        yield
    finally:
        _checked.reset(before)


def some_of(x: torch.Tensor) -> torch.Tensor | EllipsisType:
    """Return the first two and last two indices of the first dimension, enough to detect a wrong kernel.

    If the first dimension is the channels, return all.
    """
    if x.ndim < 2:
        return ...
    n = x.shape[0]
    return torch.tensor([i for i in range(n) if i < 2 or i >= n - 2], dtype=torch.int64, device=x.device)


def widened(x: Any) -> Any:
    """Return a floating-point tensor in float64, for exact results to compare with; anything else unchanged."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check_close(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> str | None:
    """Return a fault if the rms error of `got` is NaN or over twice that of plain PyTorch in the same dtype."""
    error, allowed, size = (_rms(t) for t in (got.double() - exact, plain.double() - exact, exact))
    if error <= 2 * allowed + 1e-6 * max(1.0, size):  # False for NaN
        return None
    return f"gives wrong results: rms error {error:.1e}, that of PyTorch's operators is {allowed:.1e}"


def _rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def _kind(argument: object) -> object:
    """Return the part of an argument that selects the code to run: dtype, sizes and strides of a tensor."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    return tuple(map(_kind, argument)) if isinstance(argument, list | tuple) else argument


def _is_everyones(error: Exception) -> bool:
    """Return whether the system lacks something that all kernels need: a C compiler, a writable cache folder."""
    lacks = isinstance(error, OSError | subprocess.CalledProcessError | ImportError)
    return lacks or "C compiler" in str(error)


def _for_everyone(error: Exception) -> str:
    if "C compiler" in str(error) or isinstance(error, subprocess.CalledProcessError):
        what = "Triton found no C compiler that works; install one with Python's headers, or name it by CC"
    elif isinstance(error, OSError):
        what = f"Triton cannot write to {error.filename or 'its cache'}; TRITON_CACHE_DIR may name another folder"
    else:
        what = "Triton cannot be loaded"
    return f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":  # only its stream: another thread may be capturing
        torch.cuda.current_stream(device).synchronize()


def _require_usable(op: str, device: torch.device, reason: str, error: Exception) -> None:
    """Raise if nothing can replace the kernel: the device is unusable for this process, or a capture failed."""
    if device.type != "cuda":
        return
    if torch.cuda.is_current_stream_capturing():
        _give_up(op, device, reason)
        raise KernelError(f"{op} failed while it was captured: {reason}") from error
    try:
        _synchronize(device)
    except RuntimeError:
        why = f"{op} left {_name(device)} unusable for this process: {reason}"
        raise KernelError(f"{why}; {SETTING}=off runs PyTorch's operators alone; {REPORT}") from error


def _give_up(op: str, device: torch.device, reason: str) -> None:
    what = op if op == EVERY else f"the kernel of {op}"
    why = f"{what} on {_name(device)} {reason if reason.startswith('gives wrong') else f'fails: {reason}'}"
    if setting() == "require":
        raise KernelError(f"{why}; {SETTING}=require forbids PyTorch's operators in its place")
    with _lock:
        new = (str(device), op) not in _given_up
        _given_up[str(device), op] = reason
    if new:
        ending = "" if op == EVERY else f"; {REPORT}"
        instead = "PyTorch's operators replace it for the life of this process"
        warnings.warn(f"{why}. {instead}{ending}", RuntimeWarning, stacklevel=2)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
