"""Which kernels run: those that compile, launch and answer right on this device. PyTorch's operators do the rest.

A kernel that fails is given up on for the life of the process, with one warning. Whether one answers right is found out
where an engine asks for it (`checking`): every op then holds its kernel's result against plain PyTorch's, on the same
inputs, by the rule of the parity report. DVIT_KERNELS in the environment says what may happen:

    (unset)   kernels run where they can, PyTorch's operators elsewhere
    require   a kernel that cannot run or answers wrongly is an error
    off       PyTorch's operators alone
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
REPORT = "please report this line and the output of `python -m torch.utils.collect_env` to the project"
EVERY = "every kernel"  # given up on together: what ails one ails all

Result = TypeVar("Result")
_given_up: dict[tuple[str, str], str] = {}  # device and op -> reason
_lock = threading.Lock()
_checked: ContextVar[set[object] | None] = ContextVar("checked", default=None)  # calls compared so far; None: none are


def setting() -> str:
    """DVIT_KERNELS: '' where it is not set, 'require' or 'off'.

    Raises:
        InputError: it is something else.
    """
    asked = os.environ.get(SETTING, "")
    if asked not in ("", "require", "off"):
        raise InputError(f"{SETTING}: {asked!r}; require or off can be asked for, or nothing")
    return asked


def may_run(op: str, device: torch.device) -> bool:
    """Whether the op's kernel may be tried there."""
    return setting() != "off" and not {(str(device), op), (str(device), EVERY)} & _given_up.keys()


def replaced(device: torch.device) -> list[str]:
    """The ops whose kernels were given up on there, in alphabetical order."""
    return sorted(op for where, op in _given_up if where == str(device))


def by_kernel(
    op: str,
    device: torch.device,
    kernel: Callable[[], Result],
    plain: Callable[[], Result],
    fault: Callable[[Result], str | None],
    call: Sequence[object],
) -> Result:
    """The result of an op's kernel; of PyTorch's operators where the kernel fails, now and from now on.

    Args:
        op: its name, for `may_run` and the warning.
        device: where it runs.
        kernel, plain: the two.
        fault: what is wrong with a result of the kernel, in words; None: nothing. Called while `checking`.
        call: the op's arguments; of several calls with the same sizes and settings the first is checked.

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
    except Exception as error:  # of whatever kind a compiler, a linker or a driver raises
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
    """Inside, every op's kernel is checked once for each combination of sizes and settings that it is called with."""
    before = _checked.set(set())
    try:
        yield
    finally:
        _checked.reset(before)


def some_of(x: torch.Tensor) -> torch.Tensor | EllipsisType:
    """The first two and the last two indices along the first dimension: enough to find a kernel wrong.

    All, where that dimension is the channels'.
    """
    if x.ndim < 2:
        return ...
    n = x.shape[0]
    return torch.tensor([i for i in range(n) if i < 2 or i >= n - 2], dtype=torch.int64, device=x.device)


def widened(x: Any) -> Any:
    """A floating-point tensor in float64, which results are held against; anything else as it is."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check_close(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> str | None:
    """What is wrong with `got`: its rms error is over twice that of plain PyTorch in the same dtype, or no number."""
    error, allowed, size = (_rms(t) for t in (got.double() - exact, plain.double() - exact, exact))
    if error <= 2 * allowed + 1e-6 * max(1.0, size):  # NaN is never
        return None
    return f"answers wrongly: rms error {error:.1e}, that of PyTorch's operators is {allowed:.1e}"


def _rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def _kind(argument: object) -> object:
    """An argument as far as it tells which code runs: of a tensor its dtype, sizes and strides."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    return tuple(map(_kind, argument)) if isinstance(argument, list | tuple) else argument


def _is_everyones(error: Exception) -> bool:
    """Whether it is the system that lacks something: a C compiler, a folder for what is compiled."""
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
    if device.type == "cuda":  # its stream alone: another thread may be capturing
        torch.cuda.current_stream(device).synchronize()


def _require_usable(op: str, device: torch.device, reason: str, error: Exception) -> None:
    """Raise where nothing can take the kernel's place: the device has failed for this process, or a capture has."""
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
    why = f"{what} on {_name(device)} {reason if reason.startswith('answers') else f'fails: {reason}'}"
    if setting() == "require":
        raise KernelError(f"{why}; {SETTING}=require forbids PyTorch's operators in its place")
    with _lock:
        new = (str(device), op) not in _given_up
        _given_up[str(device), op] = reason
    if new:
        ending = "" if op == EVERY else f"; {REPORT}"
        instead = "PyTorch's operators take its place for the life of this process"
        warnings.warn(f"{why}. {instead}{ending}", RuntimeWarning, stacklevel=2)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
