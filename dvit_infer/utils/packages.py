"""Packages that only some of the work needs: whether they are there, and what to install where they are not."""

import importlib.util

from dvit_infer.errors import InputError


def need(what: str, *packages: str, extra: str) -> None:
    """Raise InputError, naming `what` needs them, if a package is not installed; `extra` is what to install."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise InputError(f"{what} needs {', '.join(missing)}, not installed; pip install '{extra}' would do")
