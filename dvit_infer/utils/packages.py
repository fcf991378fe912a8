"""Optional packages: check that they are installed, and name the extra to install if not; import those with a need."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from dvit_infer.errors import InputError


def need(what: str, *packages: str, extra: str) -> None:
    """Raise InputError if a package is missing; the message names `what` needs it and the `extra` to install."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise InputError(f"{what} needs {', '.join(missing)}, not installed; run pip install '{extra}'")


_DECLARED: list[Any] = []  # libraries: what they declare goes with them


def import_beside_torchvision(package: str) -> ModuleType:
    """Import timm or transformers, which import torchvision, whichever version of torch it is for.

    Its compiled half is built for one version of torch, and importing the rest looks up that half's operators. Plain
    vision transformers call none of them, so declaring them is enough.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # transformers does without
    except (RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_torchvision_ops()
    return importlib.import_module(package)


def _declare_torchvision_ops() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("_meta_registrations.py").read_text()
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in sorted(set(re.findall(r'register_(?:fake|meta)\("(?:torchvision::)?(\w+)"', source))):
        library.define(f"{name}(Tensor a) -> Tensor")
    _DECLARED.append(library)
