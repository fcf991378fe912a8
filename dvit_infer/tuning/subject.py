"""The model that is tuned: its checkpoint, read once, and engines of it with any reduction."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvit_infer.config import Config
from dvit_infer.engine import Engine, calibrated, placed
from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import Source, read_checkpoint
from dvit_infer.models.reading import Note
from dvit_infer.models.registry import recognise
from dvit_infer.models.source import WeightSource
from dvit_infer.onnx.engine import is_onnx
from dvit_infer.reduction import METHODS
from dvit_infer.tuning.points import Settings
from dvit_infer.utils.memory import return_freed

_SEARCHED = ("keep_rate", "prune_at", "merge")
_OF_METHODS = {name for method in METHODS.values() for name in method.SETTINGS}


class Subject:
    """Arguments are as for `convert`, which makes the same engines; weights are read and calibrated once.

    Raises:
        InputError: as for `convert`; or `assume` gives what is searched, or the model is an ONNX file.
    """

    def __init__(
        self,
        source: Source,
        arch: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        assume: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        calibrate: str | Path | torch.Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        self.device, self._dtype, self.int8 = placed(device, dtype)
        if is_onnx(source):
            raise InputError(f"model: {source} was converted with its tokens fixed; give the checkpoint instead")
        if calibrate is not None and not self.int8:
            raise InputError("calibrate: is for dtype int8")
        if assume is not None and not isinstance(assume, Mapping):
            raise InputError(f"assume: a dict such as {{'num_heads': 6}} is expected, not {assume!r}")
        self._assume = dict(assume or {})
        if given := [name for name in _SEARCHED if name in self._assume]:
            raise InputError(f"assume: {given[0]} is what is searched; leave it out")
        self._arch, self._image_size, self._backend = arch, image_size, backend
        self._checkpoint = read_checkpoint(source, self._assume.get("weights"))
        self._source = WeightSource(source, self._checkpoint)
        self._notes: dict[Config, list[Note]] = {}
        self._ranges: tuple[tuple[str, float, float], ...] | None = None
        self.dense = self.config("none", {})
        if calibrate is not None:
            self._ranges = calibrated(self.dense, self._checkpoint, calibrate).ranges
            self.dense = self.config("none", {})

    @property
    def digest(self) -> bytes:
        return self._source.digest

    def config(self, method: str, settings: Settings) -> Config:
        """Return the config with a method and its settings.

        Raises:
            InputError: the method does not fit the model, or a setting does not fit the method.
        """
        known = () if method == "none" else METHODS[method].SETTINGS
        given = {name: value for name, value in self._assume.items() if name in known or name not in _OF_METHODS}
        options = {"method": method, "image_size": self._image_size}
        config, notes = recognise(self._checkpoint, self._arch, {**given, **settings}, options)
        if self._ranges is not None:
            config = replace(config, ranges=self._ranges)
        self._notes[config] = notes
        return config

    def engine(self, config: Config, to_run: bool) -> Engine:
        """Return an engine; where it is not to run, but to answer the same, PyTorch saves compiling it on a CPU."""
        by_torch = not to_run and self.device.type == "cpu" and not self.int8
        engine = Engine(
            config,
            self._checkpoint.shared(),
            self._notes[config],
            self.device,
            self._dtype,
            self._source,
            "torch" if by_torch else self._backend,
            self.int8,
            cached=False,
        )
        return_freed()  # compiling DeiT-B left 600 MB, and so did each of several engines
        return engine
