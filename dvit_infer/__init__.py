"""DynamicViT inference: the public names. Each is imported on first use, so that importing the package is fast."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from dvit_infer.utils.openmp import shorten_spins

if TYPE_CHECKING:
    from dvit_infer.config import Config
    from dvit_infer.engine import Engine, convert, load
    from dvit_infer.errors import InputError
    from dvit_infer.evaluate.embed import embed
    from dvit_infer.evaluate.visualize import draw_heat_map, draw_kept
    from dvit_infer.models.recognised import load_reference
    from dvit_infer.models.registry import list_archs
    from dvit_infer.onnx.engine import load_onnx
    from dvit_infer.onnx.export import export_onnx
    from dvit_infer.ops.prune_tokens import pack_predictor, prune_tokens
    from dvit_infer.parity.report import Report
    from dvit_infer.parity.verification import verify
    from dvit_infer.serve import ray_data as ray
    from dvit_infer.tuning.result import TuneResult
    from dvit_infer.tuning.tune import tune

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "Engine": "engine",
    "InputError": "errors",
    "Report": "parity.report",
    "TuneResult": "tuning.result",
    "convert": "engine",
    "draw_heat_map": "evaluate.visualize",
    "draw_kept": "evaluate.visualize",
    "embed": "evaluate.embed",
    "export_onnx": "onnx.export",
    "list_archs": "models.registry",
    "load": "engine",
    "load_onnx": "onnx.engine",
    "load_reference": "models.recognised",
    "pack_predictor": "ops.prune_tokens",
    "prune_tokens": "ops.prune_tokens",
    "ray": "serve.ray_data",  # the module
    "tune": "tuning.tune",
    "verify": "parity.verification",
}

__all__ = [
    "Config",
    "Engine",
    "InputError",
    "Report",
    "TuneResult",
    "convert",
    "draw_heat_map",
    "draw_kept",
    "embed",
    "export_onnx",
    "list_archs",
    "load",
    "load_onnx",
    "load_reference",
    "pack_predictor",
    "prune_tokens",
    "ray",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = home if name == "ray" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


shorten_spins()  # here, because it has no effect once torch has been imported
if "torch" in sys.modules:  # register torch.ops.dvit at once: an exported program may call it
    importlib.import_module(f"{__name__}.ops")
