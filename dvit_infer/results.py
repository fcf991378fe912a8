"""Result files: rows and the environment they were measured in, as JSON, whole or not at all."""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dvit_infer.devices import slug
from dvit_infer.files import whole_file
from dvit_infer.timing import Row


def environment() -> dict[str, str | None]:
    """Where a measurement was taken; stands in every result file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": machine_name(gpu),
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def machine_name(gpu: str | None) -> str:
    """A short name that may be a folder's: of the GPU, else of the CPU and its threads."""
    return slug(gpu or f"{_cpu()} {torch.get_num_threads()} threads")


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this project's checkout, or what DVIT_COMMIT says: a copy may have come without its .git. None: neither."""
    if os.environ.get("DVIT_COMMIT"):
        return os.environ["DVIT_COMMIT"][:12]
    root = Path(__file__).resolve().parent.parent
    if _output("git", "-C", str(root), "rev-parse", "--show-toplevel") != str(root):
        return None
    return _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env={**os.environ})
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def write_results(path: Path, where: Mapping[str, str | None], rows: Sequence[Row]) -> None:
    """Write rows and the environment they were measured in."""
    write_json(path, {"environment": where, "rows": [asdict(row) for row in rows]})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all; what is not finite becomes null, which JSON has a word for."""
    with whole_file(path, "json") as part:
        part.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
