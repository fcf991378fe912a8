"""Optional packages: check that they are installed, and name the extra to install if not."""

import importlib.util

from dvit_infer.errors import InputError


def need(what: str, *packages: str, extra: str) -> None:
    """Raise InputError if a package is missing; the message names `what` needs it and the `extra` to install."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise InputError(f"{what} needs {', '.join(missing)}, not installed; pip install '{extra}' would do")
