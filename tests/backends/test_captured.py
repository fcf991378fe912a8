"""Batches and captured forwards: buckets, padding, a bounded cache, threads; and too little memory."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch

import dvit_infer as dvit
from dvit_infer.backends.captured import BUCKETS, CapturedRunner
from dvit_infer.backends.state import State
from dvit_infer.images.synthetic import sample_images

MAX_GRAPHS = 4


class Recorded:
    """Stands for a CUDA graph where there is none: a forward over buffers of its own that are never cleared."""

    buffer_bytes = 7

    def __init__(self, runner, batch, dtype):
        self.runner, self.images, self.calls = runner, torch.full((batch, 3, 224, 224), float("nan")), 0
        if dtype == torch.uint8:
            self.images = torch.zeros(batch, 3, 224, 224, dtype=dtype)

    def __call__(self, images, return_choices):
        self.calls += 1
        self.images[: len(images)].copy_(images)
        out = self.runner.run(self.images)
        choices = [stage[: len(images)].clone() for stage in out.choices if return_choices]
        return State(out.x[: len(images)].clone(), choices=choices)


@pytest.fixture
def engine(checkpoint):
    return dvit.convert(checkpoint, device="cpu", backend="torch")


@pytest.fixture
def captured(engine):
    """The engine with its runner behind captured forwards; and those made so far, by (batch, dtype), in order."""
    plain, made = engine.runner, []

    def capture(batch, dtype):
        made.append((batch, dtype))
        return Recorded(plain, batch, dtype)

    other = copy.copy(engine)
    other.runner = CapturedRunner(plain, capture)
    other.micro_batch = BUCKETS[-1]
    return other, made


@pytest.mark.parametrize("batch", [1, 3, 5, 7, 8])
def test_a_batch_between_buckets_is_padded(engine, captured, batch):
    other, made = captured
    images = sample_images(batch, (224, 224))
    expected, expected_kept = engine(images, return_kept=True)
    logits, kept = other(images, return_kept=True)
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    assert [k.shape for k in kept] == [k.shape for k in expected_kept]
    assert all(torch.equal(a, b) for a, b in zip(kept, expected_kept, strict=True))
    assert made == [(next(b for b in BUCKETS if b >= batch), torch.float32)]


def test_a_larger_batch_is_split(engine, captured):
    other, made = captured
    other.micro_batch = 4
    images = sample_images(9, (224, 224))
    torch.testing.assert_close(other(images), engine(images), atol=5e-5, rtol=0)
    assert made == [(4, torch.float32), (1, torch.float32)]


def test_one_forward_serves_every_call_of_its_size(captured):
    other, made = captured
    images = sample_images(2, (224, 224))
    first = other(images)
    assert torch.equal(other(images), first)
    assert torch.equal(other(images.double()), first)  # copying in converts
    # Another place in the batch may be summed in another order, by some processors' matrix products.
    torch.testing.assert_close(other(images.flip(0)), first.flip(0), atol=5e-5, rtol=0)
    assert torch.equal(other(images[:, :, ::1].transpose(2, 3).contiguous().transpose(2, 3)), first)
    assert made == [(2, torch.float32)]
    other((images * 50 + 120).clamp(0, 255).byte())  # normalised before it is copied in
    assert made == [(2, torch.float32)]


def test_the_cache_is_bounded_and_drops_the_longest_unused(captured, monkeypatch):
    monkeypatch.setattr("dvit_infer.backends.captured.MAX_GRAPHS", MAX_GRAPHS)
    other, made = captured
    runner = other.runner
    runner.runner = _Zeros(other.config)
    runner._capture = lambda batch, dtype: made.append(batch) or Recorded(runner.runner, batch, dtype)
    sizes = BUCKETS[: MAX_GRAPHS + 1]
    for size in (*sizes[:MAX_GRAPHS], sizes[0], sizes[-1], sizes[0], sizes[1]):
        runner.run(torch.zeros(size, 3, 224, 224))
    assert made == [*sizes, sizes[1]]  # the first was used again in time, the second had to make room
    assert len(runner._forwards) == MAX_GRAPHS
    assert runner.buffer_bytes == 7 * MAX_GRAPHS
    runner.release()
    assert runner.buffer_bytes == 0


class _Zeros:
    """A runner that costs nothing."""

    takes_uint8, dtype, device, buffer_bytes = False, torch.float32, torch.device("cpu"), 0

    def __init__(self, config):
        self.config = config

    def run(self, images):
        return State(torch.zeros(len(images), 10))


def test_a_callers_inference_mode_ends_with_its_call(captured):
    other, made = captured
    images = sample_images(1, (224, 224))
    with torch.inference_mode():
        first = other(images)
    assert torch.equal(other(images), first)  # the buffers can still be written
    assert made == [(1, torch.float32)]


def test_given_sets_and_a_hook_run_uncaptured(engine, captured):
    other, made = captured
    images = sample_images(2, (224, 224))
    expected, kept = engine(images, return_kept=True)
    torch.testing.assert_close(other(images, kept=kept), expected)
    seen = []
    other.runner.run(images, None, lambda node, out: seen.append(node.name))
    assert len(seen) == len(engine.graph.nodes)
    assert made == []


def test_several_threads_get_their_own_answers(engine, captured):
    other, _ = captured
    images = sample_images(6, (224, 224))
    expected = engine(images)
    wrong = []

    def work(i):
        for size in (1, 2):
            logits = other(images[i : i + size])
            if (logits - expected[i : i + size]).abs().max() > 5e-5:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Small:
    """A GPU with room for so many images at a time."""

    def __init__(self, runner, room):
        self.runner, self.room, self.sizes, self.released = runner, room, [], 0

    def run(self, images, given=None, hook=None, return_choices=True, output="logits"):
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.runner.run(images, given, hook)

    def release(self):
        self.released += 1


def test_too_little_memory_for_a_batch_takes_fewer_at_a_time(engine):
    images = sample_images(7, (224, 224))
    expected = engine(images)
    engine.runner = small = Small(engine.runner, 2)
    torch.testing.assert_close(engine(images), expected, atol=5e-5, rtol=0)
    assert small.sizes == [7, 4, 2, 2, 2, 1]
    assert small.released == 2
    engine(images)
    assert small.sizes[6:] == [2, 2, 2, 1]  # it remembers


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_too_little_memory_in_other_words(engine, words):
    class Other(Small):
        def run(self, images, *given, **named):
            try:
                return super().run(images, *given, **named)
            except torch.OutOfMemoryError:
                raise RuntimeError(words) from None

    images = sample_images(3, (224, 224))
    expected = engine(images)
    engine.runner = Other(engine.runner, 2)
    torch.testing.assert_close(engine(images), expected, atol=5e-5, rtol=0)


def test_other_errors_are_no_lack_of_memory(engine):
    def broken(*given, **named):
        raise RuntimeError("something else")

    engine.runner = SimpleNamespace(run=broken)
    with pytest.raises(RuntimeError, match="something else"):
        engine(sample_images(2, (224, 224)))


def test_too_little_memory_for_one_image_is_said(engine):
    engine.runner = Small(engine.runner, 0)
    with pytest.raises(MemoryError, match="not one image of 224x224 fits in what is free on cpu"):
        engine(sample_images(2, (224, 224)))
