"""CapturedForward without a GPU: streams and events that do nothing, and graphs whose replay runs it again."""

import contextlib

import pytest
import torch
from any_vit import tiny
from golden_cases import case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends.captured import CapturedForward, CapturedRunner
from dvit_infer.ops.choices import Choices, using


class Nothing:
    def __init__(self, *given):
        pass

    def __getattr__(self, name):
        return lambda *given: None


class Graph:
    """Replays by running the forward on what its input now holds, into the outputs of the capture."""

    def replay(self):
        again = self.forward._forward(self.sizes, Nothing(), Nothing())
        for (_, ours), (_, new) in zip((out := self.forward._output).decided, again.decided, strict=True):
            ours.copy_(new)
        out.x.copy_(again.x)


@contextlib.contextmanager
def block(*given, **named):
    yield


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Stands for the parts of torch.cuda that a capture uses."""
    stubs = {"Stream": Nothing, "Event": Nothing, "CUDAGraph": Graph, "graph": block, "stream": block}
    stubs |= {"current_stream": Nothing, "empty_cache": Nothing, "memory_reserved": lambda device: 0}
    for name, stub in {**stubs, "graph_pool_handle": Nothing}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    call = CapturedForward.__call__

    def known(forward, images, return_choices):
        batch = len(forward._input)
        first = forward.first_in_two
        forward._graph.forward = forward
        forward._graph.sizes = [batch // 2, batch - batch // 2] if first and batch >= first else [batch]
        return call(forward, images, return_choices)

    monkeypatch.setattr(CapturedForward, "__call__", known)


@pytest.mark.parametrize("case_id", ["tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"])
@pytest.mark.parametrize("in_two", [None, 4])
@pytest.mark.parametrize("apart", [None, 4])
def test_its_outputs_are_those_of_the_runner(case_id, in_two, apart, monkeypatch):
    """Whole or in two branches, from images or from tokens; padded to six and to one, and called again."""
    monkeypatch.setattr(CapturedForward, "first_in_two", in_two, raising=False)
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", backend="torch", **options(case_id))
    agrees(engine, case_images(case_id).repeat(2, 1, 1, 1)[:5], in_two, apart)


@pytest.mark.parametrize("kind", ["clip", "eva02", "siglip", "beit"])
def test_so_are_those_of_other_kinds(kind, monkeypatch):
    """Whose places are gathered, whose first node is not followed by a block, whose last one is no head."""
    monkeypatch.setattr(CapturedForward, "first_in_two", 4, raising=False)
    model = tiny(kind, "random")
    agrees(model.engine(backend="torch"), model.images(5), in_two=4, apart=4)


@pytest.mark.parametrize("in_two", [None, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("headless-mean", "tome"), ("eva02", "evit")]
    + [pytest.param(kind, method, marks=pytest.mark.slow) for kind in ("siglip", "beit") for method in ("evit", "tome")]
    + [pytest.param("headless-mean", "evit", marks=pytest.mark.slow)]
    + [pytest.param("eva02", "tome", marks=pytest.mark.slow)],
)
def test_so_are_those_of_fused_and_merged_tokens(kind, method, in_two, monkeypatch):
    """Positions and groups are found from what the stages decided; a block may need them itself, for its places."""
    monkeypatch.setattr(CapturedForward, "first_in_two", in_two, raising=False)
    model = tiny(kind, method)
    agrees(model.engine(backend="torch"), model.images(5), in_two, apart=4, atol=2e-5)


@pytest.mark.parametrize("in_two", [None, 4])
@pytest.mark.parametrize("method", ["evit", "tome"])
def test_a_choice_that_moves_nothing_is_left_out(method, in_two, monkeypatch):
    """Where the head reads the class token alone; who asks for the choices has them from the runner itself."""
    monkeypatch.setattr(CapturedForward, "first_in_two", in_two, raising=False)
    model = tiny("deit", method)
    engine, images = model.engine(backend="torch"), model.images(5)
    expected, expected_kept = engine(images, return_kept=True)
    engine.runner = captured = CapturedRunner(engine.runner)
    with using(Choices(two_branches_from=in_two)):
        logits, kept = engine(images, return_kept=True)
        assert torch.equal(logits, expected)
        assert all(map(torch.equal, kept, expected_kept))
        assert not captured._forwards
        torch.testing.assert_close(engine(images), expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(engine(images, kept=kept), expected, atol=2e-5, rtol=0)
        assert engine.tokens(images)[0].shape[0] == 5
    (forward,) = captured._forwards.values()
    assert [node.name for node, _ in forward._output.decided] == ["prune.0" if method == "evit" else "merge.0"]
    assert forward._output.choices == []


def agrees(engine, images, in_two, apart, atol=5e-5):
    expected, expected_kept = engine(images, return_kept=True)
    engine.runner.embeds_apart_from = apart
    engine.runner = CapturedRunner(engine.runner)
    with using(Choices(two_branches_from=in_two)):
        for part in (slice(0, 5), slice(2, 3), slice(0, 5)):
            logits, kept = engine(images[part], return_kept=True)
            torch.testing.assert_close(logits, expected[part], atol=atol, rtol=0)
            assert all(torch.equal(a, b[part]) for a, b in zip(kept, expected_kept, strict=True))
    assert sorted(size for size, _ in engine.runner._forwards) == [1, 6]
