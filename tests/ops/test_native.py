"""The native library through ctypes: against the reference in all dtypes, its errors, DVIT_PRUNE=native in engines."""

import copy
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from golden_cases import answers, case_images, official_checkpoint, options
from kernel_helpers import bits
from prune_tokens_inputs import DTYPES, make_predictor, make_x

import dvit_infer as dvit
from dvit_infer.backends.cpu import CpuRunner, Linear
from dvit_infer.cli import bench
from dvit_infer.errors import InputError
from dvit_infer.ops import native
from dvit_infer.ops.prune_tokens import (
    backend_of,
    gather_tokens_ref,
    prune_tokens_ref,
    score_tokens_ref,
    select_tokens_ref,
)

pytestmark = pytest.mark.slow  # it builds the library
HEADER = ROOT / "kernels/csrc/include/dvit_kernels.h"
CPU = torch.device("cpu")


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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("native"), "-DDVIT_CUDA=OFF")


@pytest.fixture
def _library(built, monkeypatch):
    monkeypatch.setenv("DVIT_NATIVE_LIBRARY", built)


@pytest.fixture
def _native(_library, monkeypatch):
    monkeypatch.setenv("DVIT_PRUNE", "native")


def float64_scores(x, p, predictor) -> tuple[torch.Tensor, float]:
    """The scores in float64, and how far from the cut a token may stay or go: four of PyTorch's errors."""
    plain = score_tokens_ref(x[:, p:], dvit.pack_predictor(predictor, x.dtype), 1e-5)
    logits = copy.deepcopy(predictor).double()(x[:, p:].double())
    right = logits[..., 0] - logits[..., 1]
    return right, 4 * (plain - right).abs().max().item() + 1e-6


def differ_only_at_the_cut(index, theirs, right, margin) -> bool:
    """Whether every token that one choice alone keeps scores as the last one that stays does."""
    k = index.shape[1]
    cuts = right.sort(dim=1, descending=True).values[:, k - 1]
    pairs = zip(index.tolist(), theirs.tolist(), strict=True)
    return all(abs(right[i, j] - cuts[i]) <= margin for i, (a, b) in enumerate(pairs) for j in set(a) ^ set(b))


def check_against_float64(x, k, p, kept_x, index, predictor) -> None:
    """Sets differ from the stable float64 ranking only at the cut; rows are those of the set, bit by bit."""
    right, margin = float64_scores(x, p, predictor)
    assert all(row == sorted(set(row)) for row in index.tolist())
    assert index.shape == (len(x), k)
    assert index.dtype == torch.int64
    assert differ_only_at_the_cut(index, select_tokens_ref(right, k), right, margin)
    assert torch.equal(bits(kept_x), bits(gather_tokens_ref(x.contiguous(), index, p)))


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "n", "p", "c", "k"),
    [
        (3, 196, 1, 384, 137),
        (2, 137, 2, 192, 96),
        (2, 49, 0, 64, 49),
        (40, 1, 1, 64, 1),
        (9, 3, 5, 12, 2),
        (5, 33, 2, 98, 7),
        (1, 1500, 1, 32, 701),
    ],
)
def test_sets_and_rows(b, n, p, c, k, dtype):
    x, predictor = make_x(b, n, p, c, dtype), make_predictor(c)
    kept_x, index = native.prune_tokens(x, dvit.pack_predictor(predictor, dtype), k, p, 1e-5)
    check_against_float64(x, k, p, kept_x, index, predictor)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    packed, wide = dvit.pack_predictor(make_predictor(64), dtype), make_x(6, 40, 1, 128, dtype)
    views = (
        wide[::2, :, :64],
        wide[:, ::2, 64:],
        wide.transpose(0, 1)[:30, :, :64],
        wide[..., ::2],
        wide[:, :, 1:65],
        wide[:1, :, :64].expand(3, -1, -1),
        wide[:, :1, :64].expand(-1, 9, -1),
    )
    for x in views:
        kept_x, index = native.prune_tokens(x, packed, 3, 1, 1e-5)
        right_x, right = native.prune_tokens(x.contiguous(), packed, 3, 1, 1e-5)
        assert torch.equal(index, right)
        assert torch.equal(kept_x, right_x)
        assert kept_x.is_contiguous()


def select_gather(x, score, k, threads=2) -> tuple[torch.Tensor, torch.Tensor]:
    shape = native._Tokens(0, len(x), 0, x.shape[1], x.shape[2], k, x.stride(0), x.stride(1))
    kept_x, index = x.new_empty(len(x), k, x.shape[2]), torch.empty(len(x), k, dtype=torch.int64)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, score, kept_x, index))
    assert native.library().dvit_select_gather(ctypes.byref(shape), *pointers, threads) == 0
    return kept_x, index


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("n", [1, 2, 33, 196, 1024, 5000])
def test_selection_of_any_scores(n):
    """dvit_select_gather: ties, zeros of both signs, infinities and NaN."""
    nan, inf = float("nan"), float("inf")
    generator = torch.Generator().manual_seed(n)
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, -nan, 1e-45, -1e-45])
    score = torch.stack(
        [
            torch.randn(n, generator=generator),
            odd[torch.randint(len(odd), (n,), generator=generator)],
            torch.full((n,), nan),
            torch.full((n,), -0.0).index_fill(0, torch.arange(0, n, 2), 0.0),
        ]
    )
    x = torch.arange(len(score) * n * 3, dtype=torch.float32).view(len(score), n, 3)
    for k in range(1, n + 1) if n <= 33 else (1, n // 3, n):
        kept_x, index = select_gather(x, score, k)
        assert torch.equal(index, select_tokens_ref(score, k))
        assert torch.equal(kept_x, gather_tokens_ref(x, index, 0))


@pytest.mark.usefixtures("_library")
def test_selection_knows_denormals_where_the_processor_takes_them_for_zero():
    score, x = torch.tensor([[0.0, -1e-45, 1e-45, -0.0]]), torch.zeros(1, 4, 3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not")
    try:
        index = [select_gather(x, score, k)[1].tolist() for k in (1, 2, 3)]
    finally:
        torch.set_flush_denormal(False)
    assert index == [[[2]], [[0, 2]], [[0, 2, 3]]]


@pytest.mark.usefixtures("_library")
def test_openmp_is_asked_for_no_more_threads_than_it_was_set_to():
    x, score = torch.zeros(64, 50, 4096), torch.zeros(64, 50)  # 50 MiB to copy: worth 50 threads

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    torch.zeros(1 << 20).exp_()  # as many as PyTorch has are there from now on
    before = threads()
    for asked in (torch.get_num_threads() + 5, 0):
        select_gather(x, score, 50, asked)
        assert threads() == before


@pytest.mark.usefixtures("_library")
def test_no_images():
    packed = dvit.pack_predictor(make_predictor(64))
    kept_x, index = native.prune_tokens(torch.zeros(0, 9, 64), packed, 4, 1, 1e-5)
    assert kept_x.shape == (0, 5, 64)
    assert index.shape == (0, 4)


@pytest.mark.usefixtures("_library")
def test_what_the_library_refuses_is_told_in_its_words():
    packed = dvit.pack_predictor(make_predictor(64))
    with pytest.raises(ValueError, match=r"native library: shape.keep: 10; 1 to 8 is expected"):
        native.prune_tokens(torch.zeros(1, 9, 64), packed, 10, 1, 1e-5)
    with pytest.raises(ValueError, match="eps: nan"):
        native.prune_tokens(torch.zeros(1, 9, 64), packed, 3, 1, float("nan"))


def test_structures_follow_the_header():
    header = HEADER.read_text()

    def fields(name: str) -> list[str]:
        body = re.sub(r"/\*.*?\*/", "", re.search(rf"struct {name} {{(.*?)}}", header, re.DOTALL)[1], flags=re.DOTALL)
        return re.findall(r"(\w+)(?=[;,])", body)

    assert fields("dvit_tokens") == [name for name, _ in native._Tokens._fields_]
    assert fields("dvit_predictor") == [name for name, _ in native._Predictor._fields_]
    assert (ctypes.sizeof(native._Tokens), ctypes.sizeof(native._Predictor)) == (64, 80)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_runs_it_when_asked(dtype, monkeypatch):
    x, packed = make_x(2, 30, 1, 64, dtype), dvit.pack_predictor(make_predictor(64), dtype)
    right_x, right = native.prune_tokens(x, packed, 9, 1, 1e-5)
    monkeypatch.setattr("dvit_infer.ops.prune_tokens.prune_tokens_ref", None)
    kept_x, index = dvit.prune_tokens(x, packed, 9)
    assert torch.equal(index, right)
    assert torch.equal(kept_x, right_x)
    torch.library.opcheck(torch.ops.dvit.prune_tokens.default, (x, packed, 5, 1, 1e-5))
    assert backend_of(CPU, 30, 64) == "native (CPU)"


@pytest.mark.usefixtures("_native")
def test_sizes_beyond_it_run_in_pytorch_and_are_told():
    assert backend_of(CPU, 9, 3) == "PyTorch"


@pytest.mark.usefixtures("_native")
def test_dvit_bench_says_who_prunes(tmp_path, capsys):
    given = [str(ROOT / "bench/proof/digits-0.7.pth"), "--batch", "2", "--seconds", "0", "--device", "cpu"]
    assert bench.main([*given, "--json", str(tmp_path / "b.json")]) == 0
    assert "prune_tokens by native (CPU)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["runtime"]: row["variant"] for row in rows} == {"reference": None, "dense": None, "engine": "native"}


def test_only_native_can_be_asked_for(monkeypatch):
    x, packed = torch.zeros(1, 9, 64), dvit.pack_predictor(make_predictor(64))
    monkeypatch.setenv("DVIT_PRUNE", "fast")
    with pytest.raises(InputError, match="DVIT_PRUNE: 'fast'"):
        dvit.prune_tokens(x, packed, 3)
    monkeypatch.setenv("DVIT_PRUNE", "")
    right = prune_tokens_ref(x, packed, 3)[1]
    assert torch.equal(dvit.prune_tokens(x, packed, 3)[1], right)


def test_a_library_that_cannot_be_used_is_told_in_one_line(tmp_path, monkeypatch):
    x, packed = torch.zeros(1, 9, 64), dvit.pack_predictor(make_predictor(64))
    monkeypatch.setenv("DVIT_PRUNE", "native")

    def refusal(path: Path) -> str:
        monkeypatch.setenv("DVIT_NATIVE_LIBRARY", str(path))
        with pytest.raises(InputError, match="DVIT_PRUNE") as error:
            dvit.prune_tokens(x, packed, 3)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "DVIT_NATIVE=1 pip install" in refusal(tmp_path / "nowhere.so")
    assert "DVIT_NATIVE_LIBRARY" in refusal(tmp_path / "nowhere.so")
    (tmp_path / "text.so").write_text("no library")
    assert "cannot be used" in refusal(tmp_path / "text.so")
    with pytest.raises(InputError, match="DVIT_PRUNE"):
        dvit.convert(official_checkpoint("tiny-deit-r0.7-s1"), device="cpu", **options("tiny-deit-r0.7-s1"))


@pytest.mark.usefixtures("_library")
def test_a_library_of_another_version_is_refused(monkeypatch):
    native._load.cache_clear()
    monkeypatch.setattr(native, "__version__", "9.9")
    with pytest.raises(InputError, match=rf"has version {re.escape(dvit.__version__)}, not 9\.9"):
        native.library()


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("linear", [Linear(torch.float32, False), Linear(torch.float32, True)], ids=str)
@pytest.mark.parametrize("case_id", ["tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"])
def test_engines_give_the_golden_answers(case_id, linear):
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", **options(case_id))
    assert engine.graph.runtime.endswith(", prune_tokens by native (CPU)")
    engine.runner = CpuRunner(engine.runner._graph, linear)
    assert engine.runner.runtime == f"PyTorch, {linear}, prune_tokens by native (CPU)"
    right, right_kept, _ = answers(case_id)
    logits, kept = engine(case_images(case_id), return_kept=True)
    assert (logits - right).abs().max() < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(kept, right_kept, strict=True))


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_engines_in_reduced_precision_pass_verify(dtype):
    source = official_checkpoint("tiny-deit-r0.7-s1")
    report = dvit.verify(
        dvit.convert(source, device="cpu", dtype=dtype, **options("tiny-deit-r0.7-s1")), source, num_images=16
    )
    assert report.passed, str(report)


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
    for x in (wide[::2, :, :64], wide[:, ::2, 64:], wide[:, :, 1:65], wide[:1, :, :64].expand(3, -1, -1)):
        kept_x, index = dvit.prune_tokens(x, packed, 3)
        right_x, right = dvit.prune_tokens(x.contiguous(), packed, 3)
        assert torch.equal(index, right)
        assert torch.equal(kept_x, right_x)


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
def test_on_cuda_a_captured_graph_gives_the_eager_answer():
    x = make_x(3, 196, 1, 384, torch.bfloat16).cuda()
    packed = [t.cuda() for t in dvit.pack_predictor(make_predictor(384), torch.bfloat16)]
    dvit.prune_tokens(x, packed, 137)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept_x, index = dvit.prune_tokens(x, packed, 137)
    x.copy_(make_x(3, 196, 1, 384, torch.bfloat16).flip(1).cuda())
    graph.replay()
    right_x, right = dvit.prune_tokens(x, packed, 137)
    assert torch.equal(index, right)
    assert torch.equal(kept_x, right_x)


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
def test_on_cuda_engines_say_who_prunes():
    source = official_checkpoint("tiny-deit-r0.7-s1")
    engine = dvit.convert(source, device="cuda", dtype="bfloat16", **options("tiny-deit-r0.7-s1"))
    assert "prune_tokens by native (CUDA)" in engine.graph.runtime
    assert dvit.verify(engine, source, num_images=16).passed
