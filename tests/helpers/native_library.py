"""How tests get the native library: the one that DVIT_NATIVE_LIBRARY names, or one built for them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import ROOT

from dvit_infer.ops import native


def build(folder: Path, *given: str) -> str:
    """The library, from DVIT_NATIVE_LIBRARY or built into the folder; skips where neither can be."""
    if path := os.environ.get("DVIT_NATIVE_LIBRARY"):
        return path
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("cmake and a C++ compiler are not here")
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-DDVIT_TESTS=OFF", *given],
        ["cmake", "--build", folder, "-j2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return str(folder / native.FILE)
