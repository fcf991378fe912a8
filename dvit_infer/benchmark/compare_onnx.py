"""Measure an ONNX file of any origin in the available runtimes, and check that they agree.

There is no reference, so the expected outputs, and the MACs of a foreign file, are unknown.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.benchmark import peers
from dvit_infer.benchmark.base import BaseComparison, Calls, Check
from dvit_infer.benchmark.candidates import Call, blaming
from dvit_infer.benchmark.timing import Row, Timing
from dvit_infer.errors import InputError
from dvit_infer.images.synthetic import sample_images, sample_uint8_images
from dvit_infer.onnx.engine import check_file, onnx_device
from dvit_infer.onnx.session import input_dtype, open_session, run_session
from dvit_infer.parity.agreement import SAME_MAX, SAME_RMS
from dvit_infer.utils.memory import check_batch_fits
from dvit_infer.utils.packages import need

RUNTIMES = ("onnxruntime", "openvino")
ASSUMED_SIZE = 224  # if the file does not fix it
_IMAGES = (torch.float32, torch.float16, torch.uint8)


class OnnxComparison(BaseComparison):
    """An ONNX file, loaded once in each runtime.

    Args:
        path: the file; it has one input, the images; its first output is taken as the logits.
        names: names in `RUNTIMES`; the first is the baseline.
        device: the device for ONNX Runtime.

    Raises:
        InputError: The file or an option is invalid, or a package is not installed.
    """

    def __init__(self, path: str | Path, names: Sequence[str] = (), device: str | None = None) -> None:
        self.path = check_file(path)
        names = list(dict.fromkeys(names)) or ["onnxruntime"]
        if odd := [name for name in names if name not in RUNTIMES]:
            raise InputError(f"compare: {odd[0]!r} needs the checkpoint; an ONNX file runs in {' and '.join(RUNTIMES)}")
        self.device = onnx_device(device)
        session = open_session(self.path, self.device, str(path))
        facts = session.get_modelmeta().custom_metadata_map
        self.facts: Mapping[str, str] = {key: _printable(value) for key, value in facts.items()}
        self._rate, self._gmacs, self._params = (_number(self.facts, key) for key in ("keep_rate", "gflops", "params"))
        self._input, self.fixed_batch, self._shape, self.notes = _input_of(str(path), session)
        self._dtype = input_dtype(session)
        if self._dtype not in _IMAGES:
            raise InputError(f"{path}: its input {self._input} is {session.get_inputs()[0].type}, no image's")
        assert self._dtype is not None
        self.dtype_name = str(self.facts.get("dtype") or str(self._dtype).removeprefix("torch."))
        arch, kept = self.facts.get("arch"), _listed(self.facts.get("num_keep"))
        reduction = self.facts.get("reduction") or f"keeping {kept} patches"  # files of 0.1.0 lack it
        says = f"{arch}, {reduction}" if arch else "of another origin"
        self.title = f"{_printable(self.path.name)}, {says}; {self.dtype_name}"
        self.baseline = names[0]
        self._calls: dict[str, Call] = {}
        for name in names:
            if name == "onnxruntime":
                self._calls[name] = self._in_onnxruntime(session)
            else:
                with blaming(name):
                    self._calls[name] = self._in_openvino()

    @property
    def runs(self) -> str:
        return "; ".join([f"run by {' and '.join(self._calls)} on {self.device}", *self.notes])

    def check_memory(self, batch: int) -> None:
        if self.fixed_batch not in (None, batch):
            raise InputError(f"batch: {self.path} takes {self.fixed_batch} images at a time, not {batch}")
        check_batch_fits(batch, 8 * batch * math.prod(self._shape))

    def images(self, batch: int) -> torch.Tensor:
        last = self._shape[-1] == 3 and self._shape[0] != 3
        size = (self._shape[0], self._shape[1]) if last else (self._shape[1], self._shape[2])
        made = sample_uint8_images if self._dtype == torch.uint8 else sample_images
        distinct = made(min(batch, 64), size, seed=2)
        images = distinct.repeat(-(-batch // len(distinct)), 1, 1, 1)[:batch].to(self._dtype)
        return (images.permute(0, 2, 3, 1) if last else images).contiguous()

    def _prepare(self, images: torch.Tensor) -> tuple[Calls, dict[str, Check]]:
        calls: Calls = {name: functools.partial(call, images) for name, call in self._calls.items()}
        logits = {name: self._checked(name, call(), len(images)) for name, call in calls.items()}
        errors = {name: _error(found, logits[self.baseline]) for name, found in logits.items()}
        same = SAME_MAX if self.dtype_name == "float32" else SAME_RMS
        text = "error {:.1e} of the logits' rms"
        return calls, {name: Check(None if error <= same else text.format(error)) for name, error in errors.items()}

    def _checked(self, name: str, found: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the first output as float32 logits; raise InputError if it cannot be logits."""
        if not found.is_floating_point() or found.ndim < 2 or len(found) != batch or not found.numel():
            shape = f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
            raise InputError(f"{self.path}: its first output is {shape}, no logits of {batch} images")
        if not torch.isfinite(found).all():
            raise InputError(f"{self.path}: in {name} its output has NaN or Inf")
        return found.float().cpu()

    def _verdict(self, rows: list[Row], mismatches: list[str], unchecked: list[str]) -> str:
        if mismatches:
            return f"the runtimes do NOT agree: {'; '.join(mismatches)}"
        agree = f"all runtimes agree with {self.baseline}; " if len(rows) > 1 else ""
        if self._gmacs is None:
            return f"{agree}not known: its MACs, its weights, what it prunes, whether its outputs are correct"
        why = "as the file holds no reference (the checkpoint does)"
        return f"{agree}not known: whether its outputs are correct, {why}"

    def _row_fields(self, name: str, timing: Timing) -> dict[str, Any]:
        return {
            "model": self.facts.get("arch", self.path.name),
            "keep_rate": self._rate,
            "runtime": name,
            "gmacs": self._gmacs,
            "params": None if self._params is None else int(self._params),
        }

    def _in_onnxruntime(self, session: Any) -> Call:
        output = session.get_outputs()[0].name
        return lambda images: run_session(session, {self._input: images.to(self.device)}, [output], str(self.path))[0]

    def _in_openvino(self) -> Call:
        if self.device.type != "cpu":
            raise InputError("compare: openvino runs on CPUs; leave it out, or --device cpu")
        need("compare: openvino", "onnx", "openvino", extra="dvit-infer[peers]")
        from dvit_infer.onnx.probe import probed

        with probed(self.path, False, ()) as model:  # without functions, which OpenVINO does not support
            return peers.openvino_call(model, "f32")


def _input_of(name: str, session: Any) -> tuple[str, int | None, tuple[int, ...], list[str]]:
    """Return the input's name, its fixed batch size (None: any), the shape of an image, and notes on assumptions."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        found = ", ".join(f"{value.name} {value.shape}" for value in inputs)
        raise InputError(f"{name}: one input (B, 3, H, W) or (B, H, W, 3) is expected, not {found}")
    batch, *shape = inputs[0].shape
    sizes = [size if isinstance(size, int) else None for size in shape]
    channels = 2 if sizes[2] == 3 and sizes[0] != 3 else 0
    if sizes[channels] not in (3, None):
        raise InputError(f"{name}: its input {inputs[0].name} is {inputs[0].shape}; images have three channels")
    notes = [f"its size is open, {ASSUMED_SIZE}x{ASSUMED_SIZE} is assumed"] if None in sizes else []
    fixed = [3 if i == channels else ASSUMED_SIZE if size is None else size for i, size in enumerate(sizes)]
    if 0 in (batch, *fixed):
        raise InputError(f"{name}: its input {inputs[0].name} is {inputs[0].shape}, which no image fills")
    return inputs[0].name, batch if isinstance(batch, int) else None, tuple(fixed), notes


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _number(facts: Mapping[str, str], key: str) -> float | None:
    """Return a positive number from the file's metadata, or None."""
    try:
        value = float(facts[key][:40])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _listed(kept: str | None) -> str:
    """Format '[137, 96, 67]' as '137,96,67'."""
    return (kept or "[]").strip("[]").replace(" ", "") or "all"


def _error(found: torch.Tensor, first: torch.Tensor) -> float:
    """Return the largest difference relative to the logits' rms; infinity if shapes differ."""
    if found.shape != first.shape:
        return math.inf
    if torch.equal(found, first):
        return 0.0
    return ((found - first).abs().max() / first.square().mean().sqrt()).item()
