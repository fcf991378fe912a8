"""What pyproject.toml cannot say: dvit_kernels lives under kernels/, which is itself no package.

With DVIT_NATIVE=1 in the environment the native library of kernels/csrc is built into it, by cmake with CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
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
        # After what is given, and of Release for generators with many configurations: this is where it is looked for.
        into = [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY{which}={folder}" for which in ("", "_RELEASE")]
        # What an earlier build was given is not this one's. (cmake --fresh does the same, from 3.24.)
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
        try:
            subprocess.run(["cmake", "-S", source, "-B", folder, "-DDVIT_TESTS=OFF", *given, *into], check=True)
            subprocess.run(["cmake", "--build", folder, "--config", "Release", "--parallel"], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("error: DVIT_NATIVE=1: cmake failed; what it said is above") from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / target.name, target)


class NativeWheel(bdist_wheel):
    """A wheel for this platform and any Python: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


asked = os.environ.get("DVIT_NATIVE", "")
if asked not in ("", "0", "1"):
    raise SystemExit(f"error: DVIT_NATIVE={asked!r}; 1 builds the native library, 0 or nothing does not")
native = asked == "1"
setup(
    packages=[
        *find_packages(include=["dvit_infer", "dvit_infer.*"]),
        *find_packages("kernels", include=["dvit_kernels*"]),
    ],
    package_dir={"dvit_kernels": "kernels/dvit_kernels"},
    package_data={
        "dvit_infer": ["py.typed", "digits-0.7.pth"],
        "dvit_infer.ops": ["measured/*.json"],
        "dvit_infer.models.vit": ["timm_archs.json"],
        "dvit_infer.benchmark.report": ["page.js", "page.css", "page.html"],
    },
    ext_modules=[Extension("dvit_kernels.libdvit_kernels", [])] if native else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel} if native else {},
)
