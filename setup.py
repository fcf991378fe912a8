"""What pyproject.toml cannot say: dvit_kernels lives under kernels/, which is itself no package.

With DVIT_NATIVE=1 in the environment the native library of kernels/csrc is built into it, by cmake with CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Builds libdvit_kernels by CMake where others compile an extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        if shutil.which("cmake") is None:
            raise SystemExit("error: DVIT_NATIVE=1 needs cmake 3.20 or later, which is not here")
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
        if not any(shutil.which(shlex.split(compiler)[0]) for compiler in compilers):
            raise SystemExit(f"error: DVIT_NATIVE=1 needs a C++17 compiler; there is no {' or '.join(compilers)}")
        source, folder = Path(__file__).resolve().parent, Path(self.build_temp).resolve()
        given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            subprocess.run(["cmake", "-S", source, "-B", folder, "-DDVIT_TESTS=OFF", *given], check=True)
            subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("error: DVIT_NATIVE=1: cmake failed; what it said is above") from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / target.name, target)


native = os.environ.get("DVIT_NATIVE") == "1"
setup(
    packages=[*find_packages(include=["dvit_infer", "dvit_infer.*"]), *find_packages("kernels")],
    package_dir={"dvit_kernels": "kernels/dvit_kernels"},
    package_data={
        "dvit_infer": ["py.typed", "digits-0.7.pth"],
        "dvit_infer.ops": ["measured/*.json"],
        "dvit_infer.report": ["page.*"],
    },
    ext_modules=[Extension("dvit_kernels.libdvit_kernels", [])] if native else [],
    cmdclass={"build_ext": BuildNative} if native else {},
)
