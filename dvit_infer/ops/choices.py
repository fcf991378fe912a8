"""The implementation of each op on a GPU: the fastest as measured in measured/<gpu>.json, else a safe default.

A file holds a description of the machine, rows such as

    {"op": "linear", "dtype": "bfloat16", "size": 50432, "in": 384, "out": 1152, "does": "norm", "by": "triton",
     "tile": [128, 128, 64, 8, 3]}
    {"op": "attention", "dtype": "bfloat16", "size": 1536, "queries": 197, "tokens": 197, "head_dim": 64,
     "by": "pytorch"}

and settings for capturing forwards. `bench/tune.py` writes it. A shape that was not measured uses the row of the same
kind that is nearest in size (rows, or heads of all images) if it is within a factor of `REACH`: the best tile for
50,000 rows starts too few programs for 197. Otherwise defaults decide; nothing is tuned while a model runs.
"""

import contextlib
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dvit_infer.ops.fallback import EVERY, SETTING, may_run, setting
from dvit_infer.utils.devices import slug

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # accepted by the ops
HAS_TRITON = importlib.util.find_spec("triton") is not None  # not available for every system
REACH = 4.0  # a launch may be this many times larger or smaller than the measured one whose row it uses
FOLDER = Path(__file__).with_name("measured")


@dataclass(frozen=True)
class Choice:
    """The backend of a launch: 'triton', with a tile or the kernel's default one, or 'pytorch' (cuBLAS, SDPA)."""

    by: str
    tile: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Choices:
    """The measurements and settings for one GPU.

    Attributes:
        rows: measured launches, each the winner for its shape.
        programmatic: whether kernels of a captured forward start while the one before drains.
        two_branches_from: batches of at least this size are captured as two halves side by side; None: none.
        otherwise: the backend of a launch that was not measured; None: Triton in float16 and bfloat16, PyTorch in
            float32, where its libraries use no tensor cores either.
    """

    rows: tuple[Mapping[str, Any], ...] = ()
    programmatic: bool = False
    two_branches_from: int | None = None
    otherwise: str | None = None
    _found: dict[tuple[Any, ...], Choice] = field(default_factory=dict, compare=False, repr=False)

    def of(self, op: str, dtype: torch.dtype, size: int, **kind: int | str) -> Choice:
        """Return the choice for a launch of `size` rows, or heads of all images; `kind` must match the row's."""
        key = (op, dtype, size, *kind.items())
        if key not in self._found:
            wanted = {"op": op, "dtype": str(dtype).removeprefix("torch."), **kind}
            rows = [row for row in self.rows if wanted.items() <= row.items()]
            row = min(rows, key=lambda row: _times(row["size"], size), default=None)
            if row is not None and _times(row["size"], size) <= REACH:
                self._found[key] = Choice(row["by"], tuple(row["tile"]) if row.get("tile") else None)
            else:
                self._found[key] = Choice(self.otherwise or ("pytorch" if dtype == torch.float32 else "triton"))
        return self._found[key]


def _times(one: int, other: int) -> float:
    """Return the ratio of the larger to the smaller."""
    return max(one, other) / max(1, min(one, other))


_given: ContextVar[Choices | None] = ContextVar("given", default=None)


@contextlib.contextmanager
def using(choices: Choices) -> Iterator[None]:
    """Use these choices on every device inside the block; on a CPU, kernels run in Triton's interpreter."""
    before = _given.set(choices)
    try:
        yield
    finally:
        _given.reset(before)


def choices_for(device: torch.device) -> Choices:
    """Return the choices for a GPU; the defaults if it has no file."""
    return _given.get() or _of_gpu(torch.cuda.get_device_name(device))


@functools.cache
def _of_gpu(name: str) -> Choices:
    path = FOLDER / f"{slug(name)}.json"
    return read_choices(path) if path.exists() else Choices()


@functools.cache
def _is_recent(device: torch.device) -> bool:
    """Return whether the GPU has compute capability 8.0 or later, as the kernels need."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def why_not_triton(device: torch.device) -> str | None:
    """Return why no kernel runs on the device; None: kernels run, unless disabled after a failure."""
    if setting() == "off":
        return f"{SETTING}=off"
    if device.type != "cuda":
        return None if _given.get() is not None else f"kernels are for NVIDIA GPUs, not for {device.type}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if not _is_recent(device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has {found}"
    return None


def runs_triton(device: torch.device, op: str = EVERY) -> bool:
    """Return whether kernels run on the device; with `op`, whether that op's kernel does."""
    return why_not_triton(device) is None and may_run(op, device)


def read_choices(path: Path) -> Choices:
    """Read a file that `bench/tune.py` wrote."""
    content = json.loads(path.read_text())
    return Choices(tuple(content["rows"]), content["programmatic"], content["two_branches_from"])
