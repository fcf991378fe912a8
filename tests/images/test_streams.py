"""Many images: found in order and in bounded memory, decoded in worker processes, as far ahead as is needed."""

import collections
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ENV
from drawn import draw, draw_all, write_text

import dvit_infer as dvit
from dvit_infer.images import find
from dvit_infer.images.decode import open_image
from dvit_infer.images.find import find_images
from dvit_infer.images.path_set import Names
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import AHEAD, AT_ONCE, Entry, batches, decode, fetched, pixels, running

pytestmark = pytest.mark.usefixtures("_empty_folder")
CROP = Preprocess((32, 32))


def touch(*names: str) -> None:
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(os.fsencode(name), "xb"):
            pass


def test_folders_are_searched_in_order():
    touch("b/2.JPG", "b/10.png", "b/a/x.webp", "b/notes.txt", "b/.hidden.jpg", "b/.git/x.jpg", "a.jpg", "b/c.d/y.Tiff")
    assert list(find_images(["b"])) == ["b/10.png", "b/2.JPG", "b/a/x.webp", "b/c.d/y.Tiff"]
    assert list(find_images(["b/"])) == ["b/10.png", "b/2.JPG", "b/a/x.webp", "b/c.d/y.Tiff"]
    assert list(find_images(["b/notes.txt", "a.jpg", "b/a"])) == ["b/notes.txt", "a.jpg", "b/a/x.webp"]
    assert next(find_images(["."])) == "./a.jpg"


def test_patterns():
    touch("a1.jpg", "a2.jpg", "b.png", "d1/a3.jpg", "d1/.h.jpg", "d2/e/a4.jpg", "d2/e/n.txt", "[x].jpg")
    assert list(find_images(["*.jpg"])) == ["[x].jpg", "a1.jpg", "a2.jpg"]
    assert list(find_images(["a[12].jpg", "?.png"])) == ["a1.jpg", "a2.jpg", "b.png"]
    assert list(find_images(["**/a*.jpg"])) == ["a1.jpg", "a2.jpg", "d1/a3.jpg", "d2/e/a4.jpg"]
    assert list(find_images(["d2/**"])) == ["d2/e/a4.jpg"]
    assert list(find_images(["d*"])) == ["d1/a3.jpg", "d2/e/a4.jpg"]  # folders that match are searched
    assert list(find_images(["d2/*/*.txt"])) == ["d2/e/n.txt"]  # a pattern is taken at its word
    assert list(find_images([f"{os.getcwd()}/d?/*.jpg"])) == [f"{os.getcwd()}/d1/a3.jpg"]
    assert list(find_images(["[x].jpg"])) == ["[x].jpg"]  # a file of just that name comes first
    assert list(find_images(["d1/.*"])) == ["d1/.h.jpg"]


def test_what_is_not_there_is_named_at_once():
    os.mkdir("empty")
    touch("texts/a.txt", "fine.jpg")
    for argument in ("none.jpg", "empty", "texts", "*.png", "none/*.jpg", "", "a\0b"):
        with pytest.raises(dvit.InputError) as caught:
            find_images(["fine.jpg", argument])
        assert str(caught.value).startswith(f"{argument}: " if argument.isprintable() and argument else "'")


def test_links_are_followed_but_not_round_in_circles():
    touch("real/a.jpg", "here/b.jpg")
    os.symlink("../real", "here/link")
    os.symlink("..", "here/up")
    os.symlink(".", "here/self")
    os.symlink("loop", "here/loop")
    os.symlink("gone.jpg", "here/dangling.jpg")
    found = list(find_images(["here"]))
    assert found[:3] == ["here/b.jpg", "here/dangling.jpg", "here/link/a.jpg"]
    assert {path.count("up") for path in found} == {0, 1}
    assert next(find_images(["here/**/a.jpg"])) == "here/link/a.jpg"


def test_names_that_are_not_utf8():
    names = [b"\xff.jpg", "ü.jpg".encode(), b"\xe4.jpg", b"a.jpg"]
    touch(*(os.path.join("d", os.fsdecode(name)) for name in names))
    assert [os.fsencode(path) for path in find_images(["d"])] == [b"d/" + name for name in sorted(names)]
    assert len(list(find_images(["d/*.jpg"]))) == 4


def test_a_large_folder_takes_no_more_memory(monkeypatch):
    touch(*(f"d/{number * 7919 % 6007:05}.jpg" for number in range(6007)))
    expected = [f"d/{number:05}.jpg" for number in range(6007)]
    assert list(find_images(["d"])) == expected
    in_memory = _peak(lambda: sum(1 for _ in find_images(["d"])))
    monkeypatch.setattr(find, "IN_MEMORY", 50)
    assert list(find_images(["d"])) == expected
    assert _peak(lambda: sum(1 for _ in find_images(["d"]))) < in_memory / 4


def _peak(call) -> int:
    """Return the least peak of three calls: other threads of the process allocate too."""
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        call()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return min(peaks)


def test_names_keep_what_they_are_given():
    names = Names()
    names.add([("b", False), (os.fsdecode(b"\xff"), True), ("a", True), ("b", True)])
    assert list(names) == [("a", True), ("b", True), (os.fsdecode(b"\xff"), True)]
    assert (names.get("b"), names.get("c")) == (True, None)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_errors_among_them(workers):
    paths = draw_all_with_a_text(21)
    found = list(decode([Entry(path, label) for label, path in enumerate(paths)], CROP, workers))
    assert [(image.path, image.label) for image in found] == [(path, at) for at, path in enumerate(paths)]
    assert [image.path for image in found if image.error is not None] == ["d/010.txt.jpg"]
    for image in found:
        assert (image.error is None) == (image.pixels is not None)
        assert image.seconds > 0
        if image.pixels is not None:
            np.testing.assert_array_equal(image.pixels, CROP(open_image(image.path)))


def draw_all_with_a_text(count: int) -> list[str]:
    paths = draw_all(Path("d"), count)
    paths.insert(10, str(write_text(Path("d/010.txt.jpg"))))
    return paths


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_reads_only_so_far_ahead(workers):
    draw(0).save("a.png")
    taken = itertools.count()
    stream = decode((Entry("a.png", next(taken)) for _ in itertools.count()), CROP, workers)
    for _ in range(3 * AT_ONCE):
        next(stream)
    ahead = next(taken) - 3 * AT_ONCE
    assert ahead <= AT_ONCE * AHEAD * workers
    stream.close()


def test_batches():
    paths = draw_all_with_a_text(12)
    groups = list(batches(decode(map(Entry, paths), CROP, 0), 5))
    assert [len(group) for group in groups] == [5, 5, 3]
    shapes = [tuple(images.shape) for group in groups if (images := pixels(group)) is not None]
    assert shapes == [(5, 3, 32, 32), (5, 3, 32, 32), (2, 3, 32, 32)]
    assert pixels([image for image in groups[2] if image.error is not None]) is None


def test_a_thread_fetches_one_ahead_and_hands_over_errors():
    def made():
        for number in range(3):
            taken.append(number)
            yield number
        raise dvit.InputError("no more")

    taken: list[int] = []
    assert list(fetched(iter(""))) == []
    stream = fetched(made())
    assert next(stream) == 0
    with pytest.raises(dvit.InputError, match="no more"):
        taken += list(stream)
    assert taken == [0, 1, 2]


def test_a_stream_leaves_the_process_as_it_was(recwarn):
    draw(0).save("a.png")
    state, mask = torch.get_rng_state(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    more_than_processors = min(len(os.sched_getaffinity(0)) + 1, 64)
    assert len(list(decode([Entry("a.png")] * 9, CROP, more_than_processors))) == 9
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    assert torch.equal(state, torch.get_rng_state())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


class Deadly(Preprocess):
    """Kills the worker that meets an image of one pixel; from outside, it might hold a lock of PyTorch's loader."""

    def __call__(self, image):
        if image.size == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image)


@pytest.mark.parametrize("by_thread", [False, True])
def test_a_killed_worker_is_an_error_that_says_what_would_do(by_thread):
    draw(0).save("a.png")
    draw(0, 1, 1).save("b.png")
    entries = (Entry("b.png" if at == 40 else "a.png") for at in itertools.count())
    stream = decode(entries, Deadly((32, 32)), 2)
    with pytest.raises(dvit.InputError, match=r"^workers: .* killed"), running(16):
        collections.deque(fetched(stream) if by_thread else stream, maxlen=0)


@pytest.mark.slow
def test_workers_that_nobody_reads_from_end_with_a_process_that_is_killed():
    paths = draw_all(Path("p"), 8)
    lines = "import time; from dvit_infer.images.preprocess import Preprocess; from dvit_infer.images.stream import *"
    lines += f"\nfound = decode([Entry(path) for path in {paths!r} * 99], Preprocess((224, 224)), 2); next(found)"
    lines += "\ntime.sleep(1); print('full', flush=True); time.sleep(99)"  # pipes hold 64 KiB, the next batch has 1 MiB
    process = subprocess.Popen([sys.executable, "-c", lines], env=ENV, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"full\n"
        process.kill()
        process.communicate(timeout=30)  # workers hold the pipe open
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_an_error_of_ours_is_not_taken_for_want_of_memory():
    with pytest.raises(RuntimeError, match="a mistake"), running(16):
        raise RuntimeError("a mistake")
    with pytest.raises(RuntimeError, match="a mistake"), running(16):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\na mistake")
    with pytest.raises(dvit.InputError, match="batch: 16 images do not fit"), running(16):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")


@pytest.mark.parametrize("workers", [-1, 65])
def test_workers_out_of_range(workers):
    with pytest.raises(dvit.InputError, match="workers: "):
        next(decode([Entry("a.png")], CROP, workers))
