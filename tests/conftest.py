"""Two threads; interrupts; without a GPU its tests skipped and kernels interpreted; --emulate; a file; a browser."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from golden_cases import official_checkpoint

from dvit_infer.backends import openvino_cache

# A kernel that fails is to fail its test, not to be replaced; `_kernels_as_users_have_them` takes this away.
os.environ["DVIT_KERNELS"] = "require"

# Caches are the tests' own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dvit-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
openvino_cache.MOST_BYTES = 1 << 28  # of each process; models are made up, and hardly one is used twice

torch.set_num_threads(min(2, torch.get_num_threads()))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts what runs in the background, and all below it
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Rooms whose tests are not about what runs an engine; those of the golden models are about that too, and the slow ones
# of the commands, which run what users run.
ROOMS_OF_PYTORCH = ("cli", "evaluate", "graph", "images", "models", "ops", "reduction", "serve", "training", "tuning")
GOLDEN = ("test_golden_vits.py", "test_golden_reductions.py")


@pytest.fixture(autouse=True)
def _pytorch_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch run the engines of those rooms: compiling each of them in OpenVINO takes longer than all else."""
    room = request.path.relative_to(Path(__file__).parent).parts[0]
    default = request.path.name in GOLDEN or (room == "cli" and "slow" in request.keywords)
    if room in ROOMS_OF_PYTORCH and not default:
        monkeypatch.setattr("dvit_infer.backends.why_not_openvino", lambda graph: "not in these tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the kernels' tests on compiled code, executed by kernels/emulate: one shape a kernel, or all"
    parser.addoption("--emulate", choices=("quick", "all"), help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module imports Triton, which reads the environment then."""
    if config.getoption("emulate"):
        emulated.configure()
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "large" in item.keywords:
            item.add_marker("slow")
    if chosen := config.getoption("emulate"):
        return emulated.select(config, items, chosen == "quick")
    there_is = torch.cuda.is_available()
    marker, why = ("interpreter", "kernels run on the GPU here") if there_is else ("gpu", "no NVIDIA GPU here")
    for item in items:
        if marker in item.keywords:
            item.add_marker(pytest.mark.skip(reason=why))
        if "large" in item.keywords and "interpreter-float16" in item.name:
            item.add_marker(pytest.mark.skip(reason="the interpreter runs large shapes in float32 only"))
        if "emulated" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="compiled kernels: with --emulate"))


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("emulate"):
        emulated.replace_launches(request.node, monkeypatch)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "tiny.pth.tar"
    torch.save(official_checkpoint("tiny-deit-r0.7-s1"), path)
    return path


@pytest.fixture
def _kernels_as_users_have_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing set, nothing given up on, nothing remembered."""
    monkeypatch.delenv("DVIT_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("dvit_infer.ops.fallback._given_up", {})


@pytest.fixture
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


CHROMIUM_ARGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="not run: there is no playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("not run: there is no Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=CHROMIUM_ARGS)
        yield chromium
        chromium.close()
