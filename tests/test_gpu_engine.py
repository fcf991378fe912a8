"""The engine on an NVIDIA GPU: captured forwards against uncaptured ones, any input, streams, threads, memory."""

import copy
import pickle
import threading

import pytest
import torch
from golden_cases import CASES as CASES_BY_ID
from golden_cases import official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends.captured import BUCKETS
from dvit_infer.images.synthetic import sample_images
from dvit_infer.images.tensors import normalise
from dvit_infer.models.example import example_checkpoint
from dvit_infer.ops.choices import Choices, using

pytestmark = pytest.mark.gpu
TINY, TINY_LVVIT = "tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"
DTYPES = ("float32", "bfloat16", "float16")
CASES = (TINY, TINY_LVVIT)


def converted(case_id=TINY, dtype="bfloat16", **more):
    return dvit.convert(official_checkpoint(case_id), device="cuda", dtype=dtype, **options(case_id) | more)


def size_of(case_id):
    size = CASES_BY_ID[case_id]["image_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def uncaptured(engine, images):
    return engine.runner.runner.run(images).x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case_id", CASES)
def test_a_replay_equals_the_uncaptured_forward(case_id, dtype):
    engine = converted(case_id, dtype)
    for batch in (1, 2, 3, 8):
        for seed in (0, 1):  # the second replays
            images = sample_images(batch, engine.config.image_size, seed).cuda()
            assert torch.equal(engine(images), uncaptured(engine, images))


@pytest.mark.parametrize("case_id", CASES)
@pytest.mark.parametrize(
    "choices",
    [
        Choices(otherwise="triton"),
        Choices(otherwise="pytorch"),
        Choices(programmatic=True),
        Choices(two_branches_from=2),
        Choices(programmatic=True, two_branches_from=2),
    ],
    ids=["triton", "pytorch", "programmatic", "branches", "programmatic-branches"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_of_running_agrees(case_id, dtype, choices):
    """A pruned engine with given sets, and a dense one through captured forwards, again and again."""
    reference = dvit.load_reference(official_checkpoint(case_id), **options(case_id))  # on the CPU: no TF32 in it
    images = sample_images(4, size_of(case_id))
    expected, kept = reference(images, return_kept=True)
    images, expected = images.cuda(), expected.cuda()
    tolerance = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[dtype] * expected.abs().max().item()
    with using(choices):
        engine, dense = converted(case_id, dtype), converted(case_id, dtype, method="none")
        assert (engine(images, kept=kept) - expected).abs().max() <= tolerance
        first, again = dense(images), [dense(images.flip(0)).flip(0) for _ in range(20)]
        pruned, again_pruned = engine(images), [engine(images) for _ in range(20)]
    expected_dense = converted(case_id, "float32", method="none")(images)
    assert (first - expected_dense).abs().max() <= tolerance
    # The same kernels on the same rows, whichever the place in the batch: a race would show here.
    assert all(torch.equal(one, again[0]) for one in again)
    assert all(torch.equal(one, pruned) for one in again_pruned)


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_of_any_device_dtype_and_strides(dtype):
    engine = converted(dtype=dtype)
    images = sample_images(3, (224, 224))
    expected = engine(images.cuda())
    wide = torch.zeros(3, 3, 224, 448).cuda()
    wide[..., ::2] = images.cuda()
    for other in (
        images,
        images.pin_memory(),
        images.cuda().to(memory_format=torch.channels_last),
        wide[..., ::2],
        images.cuda().flip(0).flip(0),
        images.cuda().double(),
    ):
        assert torch.equal(engine(other), expected)
    one = images[:1].cuda()
    assert torch.equal(engine(one.expand(3, -1, -1, -1)), engine(torch.cat([one] * 3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case_id", CASES)
def test_uint8_images_are_normalised_inside(case_id, dtype):
    engine = converted(case_id, dtype)
    pixels = (sample_images(3, engine.config.image_size) * 40 + 120).clamp(0, 255).byte()
    images = normalise(pixels, engine.config.mean, engine.config.std)
    expected, kept = engine(images, return_kept=True)
    tolerance = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[dtype] * expected.abs().max().item()
    assert (engine(pixels, kept=kept) - expected).abs().max() <= tolerance
    nhwc = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(engine(nhwc.cuda()), engine(pixels))
    if dtype == "float32":
        assert (engine(pixels) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_full_of_nan_changes_nothing(dtype):
    """Whatever an allocation held before: no kernel reads what none wrote."""
    engine = converted(dtype=dtype)
    images = sample_images(5, (224, 224)).cuda()
    expected, expected_uncaptured = engine(images), uncaptured(engine, images)
    for size in (2**12, 2**16, 2**20, 2**24, 2**26):
        poison = [torch.full((size,), float("nan"), device="cuda") for _ in range(8)]
        del poison
    assert torch.equal(uncaptured(engine, images), expected_uncaptured)
    fresh = converted(dtype=dtype)
    assert torch.equal(fresh(images), expected)


def test_a_image_of_nan_spoils_no_other():
    engine = converted()
    images = sample_images(4, (224, 224)).cuda()
    expected = engine(images)
    images[2] = float("nan")
    others = [0, 1, 3]
    assert torch.equal(engine(images)[others], expected[others])
    five = sample_images(5, (224, 224)).cuda()
    engine(torch.full_like(five[:1], float("nan")).expand(6, -1, -1, -1))
    assert torch.isfinite(engine(five)).all()  # the sixth, which pads, is still NaN


def test_a_callers_modes_end_with_its_call():
    engine = converted()
    images = sample_images(2, (224, 224)).cuda()
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        first = engine(images)
    assert torch.equal(engine(images), first)
    assert not engine(images.requires_grad_()).requires_grad


def test_streams_and_threads():
    engine = converted()
    images = sample_images(8, (224, 224)).cuda()
    expected = torch.cat([engine(images[i : i + 1]) for i in range(8)])
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                if not torch.equal(engine(images[i : i + 1]), expected[i : i + 1]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_that_all_come_first():
    """The first call captures, while others already wait; a second engine at the same time."""
    engine, second = (converted(dtype="float32", method="none") for _ in range(2))
    images = sample_images(6, (224, 224)).cuda()
    expected = uncaptured(engine, images)
    answers = {}

    def work(one, size):
        answers[one, size] = one(images[:size])

    sizes = (1, 2, 3, 4, 6)
    threads = [threading.Thread(target=work, args=(one, size)) for size in sizes for one in (engine, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 2 * len(sizes)
    for (_, size), logits in answers.items():
        torch.testing.assert_close(logits, expected[:size], atol=1e-4, rtol=0)


def test_inside_a_capture_of_the_callers_own():
    engine = converted()
    images = sample_images(2, (224, 224)).cuda()
    expected = engine(images)
    uncaptured(engine, images)
    static, graph = images.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = engine(static)
    static.copy_(images.flip(0))
    graph.replay()
    assert torch.equal(logits.flip(0), expected)


def test_the_cache_of_graphs_is_bounded(monkeypatch):
    monkeypatch.setattr("dvit_infer.backends.captured.MAX_GRAPHS", 3)
    engine = converted(dtype="float32", method="none")
    images = sample_images(BUCKETS[5], (224, 224)).cuda()
    expected = uncaptured(engine, images)
    for _ in range(2):
        for size in BUCKETS[:6]:
            torch.testing.assert_close(engine(images[:size]), expected[:size], atol=1e-4, rtol=0)
    assert len(engine.runner._forwards) == 3
    assert engine.runner.buffer_bytes > 0


def test_a_large_batch_is_split():
    engine = converted(dtype="float32", method="none")
    images = sample_images(7, (224, 224)).cuda().repeat(75, 1, 1, 1)
    expected = engine(images[:7])
    torch.testing.assert_close(engine(images), expected.repeat(75, 1), atol=1e-4, rtol=0)


def test_too_little_memory():
    """A cap on what PyTorch may take stands for a small GPU."""
    torch.cuda.empty_cache()
    engine = dvit.convert(example_checkpoint("deit-s"), device="cuda", dtype="float32")
    images = sample_images(2, (224, 224)).cuda().repeat(128, 1, 1, 1)
    expected = engine(images[:2])
    engine.runner.release()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        # Of 256 images the hidden channels of one MLP alone take 295 MiB, and the images 147.
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 320 * 2**20) / total)
        logits = engine(images)
        assert engine.micro_batch < 256
        torch.testing.assert_close(logits, expected.repeat(128, 1), atol=1e-4, rtol=0)
        engine.runner.release()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**20) / total)
        with pytest.raises(MemoryError, match="not one image of 224x224 fits"):
            engine(images[:1])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert torch.isfinite(engine(images[:1])).all()


def test_an_engine_can_be_copied_and_pickled():
    engine = converted()
    images = sample_images(2, (224, 224))
    expected = engine(images)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["dynamicvit-deit-s", "dynamicvit-deit-b", "dynamicvit-lvvit-s", "deit-b-distilled"])
def test_verify_passes_on_whole_models(arch, dtype):
    checkpoint = example_checkpoint(arch)
    report = dvit.verify(dvit.convert(checkpoint, device="cuda", dtype=dtype), checkpoint, num_images=64)
    assert report.passed, str(report)
    assert report.first_difference is None, str(report)
