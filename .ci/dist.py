"""Build the sdist, and the wheel from it, into dist/; check both; use the wheel as someone who installs it: make dist

The wheel is installed without extras into a fresh environment, and used in an empty folder, far from the checkout.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, BUILD = ROOT / "dist", ROOT / "build" / "dist"
DATA = """dvit_infer/py.typed dvit_infer/digits-0.7.pth dvit_infer/models/vit/timm_archs.json
    dvit_infer/benchmark/report/page.js dvit_infer/benchmark/report/page.css dvit_infer/benchmark/report/page.html"""
NATIVE = "CMakeLists.txt kernels/csrc/include/dvit_kernels.h kernels/csrc/cpu.cpp kernels/csrc/cuda/cuda.cu"


def run(*command: str | Path, cwd: Path = ROOT, quiet: bool = False) -> None:
    """Run a command without the checkout on Python's path; end with its status if it fails.

    `quiet`: what it prints is shown only if it fails.
    """
    print("$", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, check=False, **output)
    if done.returncode:
        print(done.stdout or "", end="")
        sys.exit(done.returncode)


def check_contents(wheel: Path, sdist: Path) -> None:
    """Compare the files of the wheel with those of the checkout; look for the native library's source in the sdist."""
    sources = {"dvit_infer": ROOT / "dvit_infer", "dvit_kernels": ROOT / "kernels" / "dvit_kernels"}
    modules = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in sources.items()
        for file in folder.rglob("*.py")
    }
    measured = {f"dvit_infer/ops/measured/{file.name}" for file in (ROOT / "dvit_infer/ops/measured").glob("*.json")}
    expected = modules | measured | set(DATA.split())
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for what, odd in (
        ("the wheel lacks", expected - found),
        ("the wheel should not have", found - expected),
        ("the sdist lacks", set(NATIVE.split()) - names),
        ("the sdist should not have", {name for name in names if name.split("/")[0] in ("tests", "bench", "examples")}),
    ):
        if odd:
            sys.exit(f"error: {what} {', '.join(sorted(odd))}")


def use(wheel: Path, python: Path, commands: list[str]) -> None:
    """Install the wheel, ask every command for help, convert the model of the proof and draw what it keeps."""
    run(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel, quiet=True)
    here = BUILD / "elsewhere"
    here.mkdir()
    imported = "import dvit_infer, dvit_kernels, sys; files = dvit_infer.__file__, dvit_kernels.__file__; print(*files)"
    run(python, "-c", f"{imported}; sys.exit(not all(file.startswith(sys.prefix) for file in files))", cwd=here)
    for command in commands:
        run(python.with_name(command), "-h", cwd=here, quiet=True)
    proof = ROOT / "bench" / "proof" / "digits-0.7.pth"
    run(python.with_name("dvit-convert"), proof, "-o", "digits.safetensors", cwd=here)
    run(python.with_name("dvit-viz"), "digits.safetensors", ROOT / "docs" / "digit.png", "-o", "kept.png", cwd=here)


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    shutil.rmtree(BUILD, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, quiet=True)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    check_contents(wheel, sdist)
    run(sys.executable, "-m", "venv", BUILD / "venv")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    use(wheel, BUILD / "venv" / "bin" / "python", list(project["scripts"]))
    shutil.rmtree(BUILD)  # a gigabyte; after a failure it stays, to be looked at
    print(f"checked {wheel.relative_to(ROOT)} and {sdist.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
