"""Result files: rows and the environment of the measurement, as JSON. Reading one needs no torch."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.utils.files import atomic_write_json

VERSION = 2
NAMES_SINCE_1 = {
    "how": "runtime",
    "mode": "variant",
    "gflops": "gmacs",
}  # renamed; the values are the same: gflops counted MACs too


def environment() -> dict[str, str | None]:
    """Return the environment of a measurement, part of every result file."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": machine_name(gpu),
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "commit": _commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def machine_name(gpu: str | None) -> str:
    """Return a short name, usable as a folder name, of the GPU, else of the CPU and its threads."""
    import torch

    from dvit_infer.utils.devices import slug

    return slug(gpu or f"{cpu_name()} {torch.get_num_threads()} threads")


def cpu_name() -> str:
    """Return the processor's name, as Linux has it, else its architecture."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """Return the version of an installed distribution; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this checkout, or DVIT_COMMIT for a copy without .git; None if neither is known."""
    if os.environ.get("DVIT_COMMIT"):
        return os.environ["DVIT_COMMIT"][:12]
    root = Path(__file__).resolve().parents[2]
    if _output("git", "-C", str(root), "rev-parse", "--show-toplevel") != str(root):
        return None
    return _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env={**os.environ})
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file, {"environment": {...}, "rows": [...]} and its version, atomically."""
    atomic_write_json(path, {"version": VERSION, **content})


def read_results(path: str | Path) -> dict[str, Any]:
    """Return the content of a result file, with rows converted to version 2.

    Raises:
        InputError: The file cannot be read, is not a result file, or has an unknown version.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    return as_version_2(content, str(path))


def as_version_2(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Convert the content of a result file of version 1, which had no version key, or 2 to version 2.

    Raises:
        InputError: It is not a result file, or has another version; the message begins with `name`.
    """
    try:
        version = content.get("version", 1)
        if version not in (1, VERSION):
            raise InputError(f"{name}: is a result file of version {version!r:.20}; 1 and {VERSION} can be read")
        renamed = NAMES_SINCE_1 if version == 1 else {}
        rows = [{renamed.get(key, key): value for key, value in row.items()} for row in content["rows"]]
        return {**content, "version": VERSION, "environment": content["environment"], "rows": rows}
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: is not a result file ({type(error).__name__}: {error})") from None
