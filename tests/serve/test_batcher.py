"""The batcher's policy by a clock that stands still, and its thread by an engine that waits for the test."""

import threading

import numpy as np
import pytest

from dvit_infer.serve.batcher import Batcher, ExpiredError, FullError


class Meter:
    def __init__(self):
        self.waiting, self.batches = [], []

    def queued(self, images):
        self.waiting.append(images)

    def ran(self, images, seconds):
        self.batches.append(images)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def images(*values, dtype=np.uint8):
    """An image (3, 1, 1) for each value."""
    return np.array(values, dtype).reshape(-1, 1, 1, 1).repeat(3, axis=1)


def double(batch):
    return batch[:, :2, 0, 0].astype(np.float32) * 2


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def batcher(clock):
    return Batcher(double, max_batch=4, full=4, max_delay_s=0.5, max_queue=8, meter=Meter(), clock=clock)


@pytest.fixture
def queue(batcher):
    """Put images into the queue, each call a request; the places are kept by the test."""
    held = []

    def put(*values, deadline=float("inf"), dtype=np.uint8):
        place = batcher.place(len(values), deadline)
        ticket = place.__enter__()
        held.append(place)
        batcher.submit(ticket, images(*values, dtype=dtype))
        return ticket

    yield put
    for place in held:
        place.__exit__(None, None, None)


def test_a_batch_is_due_when_it_is_full_or_its_first_image_has_waited(batcher, queue, clock):
    assert batcher.due(clock.now) is None
    queue(1)
    assert batcher.due(clock.now) == 0.5
    clock.now += 0.25
    queue(2, 3)  # waits no longer for having come later
    assert batcher.due(clock.now) == 0.25
    assert batcher.due(clock.now + 0.25) == 0
    queue(4)
    assert batcher.due(clock.now) == 0


def test_batches_are_in_order_and_keep_requests_whole(batcher, queue, clock):
    a, b, c, d = queue(1), queue(2, 3), queue(4, 5), queue(6)
    assert batcher.take(clock.now) == [a, b]  # c does not fit, and d does not overtake it
    assert batcher.take(clock.now) == [c, d]
    assert batcher.take(clock.now) == []


def test_a_request_larger_than_a_full_batch_runs_alone(clock):
    batcher = Batcher(double, max_batch=4, full=2, max_delay_s=0.5, max_queue=8, meter=Meter(), clock=clock)
    with batcher.place(3) as large, batcher.place(1) as a, batcher.place(1) as b, batcher.place(1) as c:
        for ticket in (large, a, b, c):
            batcher.submit(ticket, images(*range(ticket.count)))
        assert [batcher.take(clock.now) for _ in range(3)] == [[large], [a, b], [c]]


def test_dtypes_do_not_mix(batcher, queue, clock):
    a, b, c = queue(1), queue(2, dtype=np.float32), queue(3)
    assert batcher.take(clock.now) == [a, c]
    assert batcher.take(clock.now) == [b]


def test_expired_and_abandoned_images_do_not_run(batcher, clock, queue):
    late = queue(1, deadline=clock.now + 1)
    with batcher.place(1) as gone:
        batcher.submit(gone, images(2))
    clock.now += 1
    kept = queue(3, deadline=clock.now + 1)
    assert batcher.take(clock.now) == [kept]
    assert isinstance(late.answer.exception(), ExpiredError)
    assert gone.answer.cancelled()


def test_the_queue_is_bounded_in_images_that_have_a_place(batcher, queue, clock):
    queue(1, 2, 3, 4)
    with batcher.place(4), pytest.raises(FullError, match="8 images are waiting; retry in 1 s"), batcher.place(1):
        pass
    queue(5, 6, 7, 8)  # a place that nothing was submitted for is free again
    batcher.take(clock.now)
    queue(9)
    assert batcher._meter.waiting == [4, 8, 4, 8, 4, 5]
    for count in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 are expected"), batcher.place(count):
            pass


def test_expired_images_make_room(batcher, queue, clock):
    for _ in range(2):
        queue(1, 2, 3, 4, deadline=clock.now + 1)
    clock.now += 2
    queue(5)


def test_the_thread_answers_each_request_with_its_own(clock):
    started, go = threading.Event(), threading.Event()

    def run(batch):
        started.set()
        assert go.wait(60)
        return double(batch)

    meter = Meter()
    batcher = Batcher(run, max_batch=4, full=4, max_delay_s=0, max_queue=8, meter=meter)
    warm = []
    batcher.start(lambda: warm.append(threading.current_thread().name))
    assert warm == ["batcher"]
    with batcher.place(1) as a, batcher.place(2) as b, batcher.place(1) as c:
        answers = [batcher.submit(a, images(1))]
        assert started.wait(60)
        answers += [batcher.submit(b, images(2, 3)), batcher.submit(c, images(4))]
        go.set()
        found = [answer.result(60).tolist() for answer in answers]
    assert found == [[[2, 2]], [[4, 4], [6, 6]], [[8, 8]]]
    assert meter.batches == [1, 3]
    batcher.close()


def test_an_error_reaches_those_whose_batch_it_was(batcher):
    def run(batch):
        if batch.max() == 1:
            raise RuntimeError("no")
        return double(batch)

    batcher = Batcher(run, max_batch=1, full=1, max_delay_s=0, max_queue=8, meter=Meter())
    batcher.start()
    with batcher.place(1) as a, batcher.place(1) as b:
        first, second = batcher.submit(a, images(1)), batcher.submit(b, images(2))
        assert second.result(60).tolist() == [[4, 4]]
        with pytest.raises(RuntimeError, match="no"):
            first.result(60)
    batcher.close()


def test_closing_runs_what_waits_and_hurrying_ends_the_wait():
    batcher = Batcher(double, max_batch=4, full=4, max_delay_s=1e6, max_queue=8, meter=Meter())
    batcher.start()
    with batcher.place(1) as a:
        answer = batcher.submit(a, images(1))
        batcher.close()
        assert answer.result(0).tolist() == [[2, 2]]
    batcher = Batcher(double, max_batch=4, full=4, max_delay_s=1e6, max_queue=8, meter=Meter())
    batcher.start()
    with batcher.place(1) as a:
        answer = batcher.submit(a, images(1))
        batcher.hurry()
        assert answer.result(60).tolist() == [[2, 2]]
    batcher.close()


def test_a_failed_warm_up_is_raised_at_the_start():
    def first():
        raise MemoryError("images")

    batcher = Batcher(double, max_batch=4, full=4, max_delay_s=0, max_queue=8, meter=Meter())
    with pytest.raises(MemoryError, match="images"):
        batcher.start(first)
