"""An engine's kernels are checked before its first answer: what fails is replaced, what passed is remembered."""

import warnings

import pytest
import torch
from failing_kernels import TRITON, break_kernel, one_percent_off
from golden_cases import answers, case_images, official_checkpoint, options
from kernel_helpers import needs_loops

import dvit_infer as dvit
from dvit_infer.backends.kernel_check import check_kernels
from dvit_infer.backends.state import State
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.ops.choices import Choices, using

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("_kernels_as_users_have_them"), needs_loops]
PYTORCH = Choices(otherwise="pytorch")
TINY, TINY_LVVIT = "tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"


def engine_by_kernels(case_id=TINY, dtype="float32"):
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", dtype=dtype, **options(case_id))
    with using(TRITON):
        engine.runner = TritonRunner(engine.graph)
    engine.runner.checks_kernels = True
    return engine


@pytest.mark.slow
def test_an_engine_answers_right_and_says_so(monkeypatch, tmp_path):
    break_kernel(monkeypatch, "attention", "attention", one_percent_off, None)
    expected, _, _ = answers(TINY_LVVIT)  # of small images: the interpreter is slow
    engine = engine_by_kernels(TINY_LVVIT)
    assert "in place of" not in str(engine.graph)
    with using(TRITON):
        with pytest.warns(RuntimeWarning, match="the kernel of attention") as warned:
            logits = engine(case_images(TINY_LVVIT)[:1])
        assert (logits - expected[:1]).abs().max() < 2e-5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine(case_images(TINY_LVVIT)[:1])
    assert len(warned) == 1
    assert "PyTorch in place of attention, which failed" in str(engine.graph)
    assert not (tmp_path / "cache").exists()  # what failed is looked at again


def test_what_passed_is_remembered(monkeypatch, tmp_path):
    graph, seen = engine_by_kernels().graph, []
    forward = seen.append
    with using(TRITON):
        for _ in range(2):
            check_kernels(graph, 3, False, False, forward)
        assert [tuple(images.shape) for images in seen] == [(3, 3, *graph.config.image_size)]
        assert torch.equal(seen[0][0], seen[0][2])
        assert not torch.equal(seen[0][0], seen[0][1])
        (marker,) = (tmp_path / "cache" / "dvit_infer" / "kernels").iterdir()
        assert {"gpu", "driver", "torch", "triton", "dvit_infer"} <= set(marker.read_text().split('"'))
        check_kernels(graph, 2, False, False, forward)  # another size takes other tiles
        check_kernels(graph, 2, True, False, forward)
        check_kernels(graph, 2, False, True, forward)
        monkeypatch.setattr("dvit_infer.backends.kernel_check._system", lambda device: {"triton": "3.99"})
        check_kernels(graph, 3, False, False, forward)
    assert len(seen) == 5
    assert seen[2].dtype == torch.uint8


def test_a_cache_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with using(TRITON):
        for seen in ([], []):
            check_kernels(engine_by_kernels().graph, 1, False, False, seen.append)
            assert len(seen) == 1


@pytest.mark.slow
def test_a_captured_forward_may_begin_at_the_tokens():
    """Tokens made in memory that is there, of images in any dtype and strides, give the answers of a plain call."""
    engine, images = engine_by_kernels(), case_images(TINY)[:1]
    runner = engine.runner
    tokens = torch.full((1, *runner.nodes[0].out_shape), float("nan"))
    raw = (images * 60 + 120).clamp(0, 255).to(torch.uint8)
    with using(PYTORCH):  # the patch embedding is a kernel in any case
        for given in (images.double().transpose(2, 3).contiguous().transpose(2, 3), raw):
            expected = runner.run(given)
            runner.embed_into(given, tokens)
            found = runner.run_nodes(State(tokens), runner.nodes[1:])
            torch.testing.assert_close(found.x, expected.x, atol=1e-6, rtol=0)
            assert all(torch.equal(a, b) for a, b in zip(found.choices, expected.choices, strict=True))
    plain = dvit.convert(official_checkpoint(TINY), device="cpu", backend="torch", **options(TINY))
    plain.runner.embed_into(images, tokens)
    assert torch.equal(plain.runner.run_nodes(State(tokens), plain.runner.nodes[1:]).x, plain(images))
