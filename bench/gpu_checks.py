"""Check the suite's requirements before anything starts; a missing one gives one line."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from dvit_infer.errors import InputError
from dvit_infer.ops.fallback import setting

OLDEST = (8, 0)  # compute capability


def check_machine() -> None:
    """Raise InputError unless kernels can be compiled and launched here."""
    if not torch.cuda.is_available():
        raise InputError("there is no NVIDIA GPU here; the suite needs one (--dry does not)")
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name, found = torch.cuda.get_device_name(), ".".join(map(str, capability))
        raise InputError(f"{name}: compute capability {found}; the kernels need 8.0 or later")
    setting()  # raises if DVIT_KERNELS is invalid
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed for this Python; the suite needs it")
    compiler = os.environ.get("CC") or "gcc"
    if shutil.which(compiler) is None and (os.environ.get("CC") or shutil.which("clang") is None):
        raise InputError("there is no C compiler here, gcc, clang or $CC; Triton needs one to launch kernels")
    if why := _unwritable(cache_folder()):
        raise InputError(
            f"{cache_folder()}, where Triton keeps kernels: {why}; TRITON_CACHE_DIR can name another folder"
        )


def cache_folder() -> Path:
    """Return Triton's cache folder."""
    if named := os.environ.get("TRITON_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def check_folder(path: str | Path) -> Path:
    """Return the folder for results, created if missing.

    Raises:
        InputError: It is not writable.
    """
    folder = Path(path).resolve()
    if why := _unwritable(folder):
        raise InputError(f"{path}: results cannot be written there ({why}); --out or OUT can name another folder")
    return folder


def _unwritable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)
