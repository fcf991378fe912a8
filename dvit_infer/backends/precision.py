"""Arithmetic in exactly the dtype that was asked for, whatever the caller's autocast and TF32 settings are."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_CUDNN: Any = torch.backends.cudnn  # its stubs lack the setting
_PRECISION = threading.Lock()
_in_full = 0  # the number of runs that need full precision now
_before = ""


@contextlib.contextmanager
def as_asked(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute in exactly this dtype: without the caller's autocast, without TF32 in float32 convolutions.

    cuDNN's convolutions use TF32 by default. The setting is global to the process: the first run that enters changes
    it, the last one that leaves restores it.
    """
    global _in_full, _before
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or dtype != torch.float32:
            yield
            return
        with _PRECISION:
            if _in_full == 0:
                _before = _CUDNN.conv.fp32_precision
                _CUDNN.conv.fp32_precision = "ieee"
            _in_full += 1
        try:
            yield
        finally:
            with _PRECISION:
                _in_full -= 1
                if _in_full == 0:
                    _CUDNN.conv.fp32_precision = _before
