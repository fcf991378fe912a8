"""The native library on CPUs, through ctypes: against the reference in all dtypes, odd scores, its errors."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from commands import ROOT
from kernel_helpers import DTYPES
from prune_tokens_checks import check_against_float64, check_strides
from prune_tokens_inputs import make_predictor, make_x

import dvit_infer as dvit
from dvit_infer.errors import InputError
from dvit_infer.ops import native
from dvit_infer.ops.prune_tokens import gather_tokens_ref, select_tokens_ref

pytestmark = pytest.mark.slow  # it builds the library
HEADER = ROOT / "kernels/csrc/include/dvit_kernels.h"


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
    check_strides(lambda x: native.prune_tokens(x, packed, 3, 1, 1e-5), wide)


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


@pytest.mark.usefixtures("_library")
def test_a_library_of_another_version_is_refused(monkeypatch):
    native._load.cache_clear()
    monkeypatch.setattr(native, "__version__", "9.9")
    with pytest.raises(InputError, match=rf"has version {re.escape(dvit.__version__)}, not 9\.9"):
        native.library()
