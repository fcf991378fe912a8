"""The native library on a GPU: beside Triton's choice, strides, captured graphs; that the GPU suite runs them."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import ROOT
from golden_cases import official_checkpoint, options
from kernel_helpers import DTYPES
from native_library import build
from prune_tokens_checks import (
    bits,
    check_against_float64,
    check_graph,
    check_strides,
    differ_only_at_the_cut,
    float64_scores,
)
from prune_tokens_inputs import make_predictor, make_x

import dvit_infer as dvit
from dvit_infer.ops import native
from dvit_infer.ops.prune_tokens import backend_of

pytestmark = pytest.mark.slow  # it builds the library


@pytest.fixture
def gpu_suite():
    sys.path.append(str(ROOT / "bench"))
    import gpu_tests

    return gpu_tests


def test_the_gpu_suite_says_that_nothing_native_is_tested(gpu_suite, built, monkeypatch):
    said = []
    monkeypatch.setenv("DVIT_NATIVE_LIBRARY", built)
    with_cuda = gpu_suite.name_native_library(1.0, said.append)
    assert with_cuda == bool(native.library().dvit_has_cuda())
    assert with_cuda or said[-1].endswith("NOT RUN: it was built without CUDA")
    monkeypatch.delenv("DVIT_NATIVE_LIBRARY")
    monkeypatch.setenv("PATH", "")
    assert not gpu_suite.name_native_library(1.0, said.append)
    assert said[-1].endswith("NOT RUN: no nvcc and no cmake, no DVIT_NATIVE_LIBRARY")


@pytest.mark.slow
def test_what_the_sanitizers_run_has_native_tests_in_it(gpu_suite):
    for small in (gpu_suite.SMALL, gpu_suite.SMALL_NATIVE):
        command = [sys.executable, "-m", "pytest", "-v", "--collect-only", "-m", "gpu", "-k", small, __file__]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "test_on_cuda_any_strides[torch.float16]" in found


@pytest.fixture(scope="session")
def built_with_cuda(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not os.environ.get("DVIT_NATIVE_LIBRARY") and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here, and DVIT_NATIVE_LIBRARY names no library")
    return build(tmp_path_factory.mktemp("native-cuda"), "-DDVIT_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native")


@pytest.fixture
def _on_cuda(built_with_cuda, monkeypatch):
    monkeypatch.setenv("DVIT_NATIVE_LIBRARY", built_with_cuda)
    if not native.library().dvit_has_cuda():
        pytest.skip("the library that DVIT_NATIVE_LIBRARY names was built without CUDA")
    monkeypatch.setenv("DVIT_PRUNE", "native")


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "n", "p", "c", "k"),
    [(64, 196, 1, 384, 137), (3, 50, 1, 96, 35), (70, 1, 1, 64, 1), (9, 3, 5, 160, 2), (2, 1024, 1, 1024, 700)],
)
def test_on_cuda_it_chooses_as_triton_does(b, n, p, c, k, dtype):
    from dvit_kernels.prune_tokens import launch_prune_tokens

    x, predictor = make_x(b, n, p, c, dtype).cuda(), make_predictor(c)
    packed = [t.cuda() for t in dvit.pack_predictor(predictor, dtype)]
    assert backend_of(x.device, n, c) == "native (CUDA)"
    kept_x, index = dvit.prune_tokens(x, packed, k, p)
    check_against_float64(x.cpu(), k, p, kept_x.cpu(), index.cpu(), predictor)
    their_x, theirs = launch_prune_tokens(x, packed, k, p, 1e-5)
    assert differ_only_at_the_cut(index, theirs, *float64_scores(x.cpu(), p, predictor))
    assert torch.equal(bits(kept_x[:, :p]), bits(their_x[:, :p]))
    image, ours, other = (index[:, :, None] == theirs[:, None]).nonzero(as_tuple=True)
    assert torch.equal(bits(kept_x[image, p + ours]), bits(their_x[image, p + other]))
    assert torch.equal(dvit.prune_tokens(x, packed, k, p)[1], index)  # nothing in it depends on timing


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_any_strides(dtype):
    packed = [t.cuda() for t in dvit.pack_predictor(make_predictor(64), dtype)]
    wide = make_x(6, 40, 1, 128, dtype).cuda()
    check_strides(lambda x: dvit.prune_tokens(x, packed, 3), wide)


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
def test_on_cuda_a_captured_graph_gives_the_eager_answer():
    x = make_x(3, 196, 1, 384, torch.bfloat16).cuda()
    packed = [t.cuda() for t in dvit.pack_predictor(make_predictor(384), torch.bfloat16)]
    check_graph(lambda x: dvit.prune_tokens(x, packed, 137), x)


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
def test_on_cuda_engines_say_who_prunes():
    source = official_checkpoint("tiny-deit-r0.7-s1")
    engine = dvit.convert(source, device="cuda", dtype="bfloat16", **options("tiny-deit-r0.7-s1"))
    assert "prune_tokens by native (CUDA)" in engine.graph.runtime
    assert dvit.verify(engine, source, num_images=16).passed
