"""Vision transformers as their owners write them answer as their owners' code does: reference, engine, saved file."""

import itertools

import numpy as np
import pytest
import torch
from golden_vits import CASES, EVERY_CASE, TINY, answers, assumptions, case_images, options, part, write

import dvit_infer as dvit
from dvit_infer.parity.verification import evaluate

NPZ = [case for case, row in CASES.items() if row["system"] == "big_vision"]
DTYPES = ["bfloat16", "float16"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The sources of the tiny cases, each written once."""
    folder, sources = tmp_path_factory.mktemp("golden"), {}

    def source(case):
        if case not in sources:
            sources[case] = write(case, folder / case)
        return sources[case]

    return source


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("case", EVERY_CASE)
def test_reference_and_engine_answer_as_the_owner(case, tmp_path):
    source, images = write(case, tmp_path / "m"), case_images(case)
    answer, tokens = answers(case)
    with torch.no_grad():
        found = dvit.load_reference(source, **options(case)).evaluate(images)
    assert farthest(found.logits, answer) < 2e-5
    engine = dvit.convert(source, device="cpu", **options(case))
    out = engine(images)
    assert farthest(out, answer) < 1e-4
    assert farthest(engine.features(images), found.features) < 1e-4
    if engine.config.num_classes == 0:
        assert torch.equal(engine.features(images), out)
        assert torch.equal(found.features, found.logits)
    seen, positions = engine.tokens(images)
    assert farthest(seen, found.tokens) < 1e-4
    assert torch.equal(positions, torch.arange(engine.config.num_patches).expand(len(images), -1))
    if tokens is not None:
        steps = 16 * np.spacing(tokens.abs().max().item(), dtype=np.float32)  # they are not normalised everywhere
        assert farthest(part(case, found.tokens), tokens) < max(2e-5, steps)
        assert farthest(part(case, seen), tokens) < 1e-4


@pytest.mark.parametrize(
    ("case", "dtype"),  # the quick tests have every fourth case, and the dtypes by turns
    [pytest.param(case, dtype, marks=[pytest.mark.large] * (at % 8 != 4 * other))
     for at, case in enumerate(TINY) for other, dtype in enumerate(DTYPES)],
)  # fmt: skip
def test_reduced_precision_errs_as_plain_pytorch_does(case, dtype, written):
    source = written(case)
    engine = dvit.convert(source, device="cpu", dtype=dtype, **options(case))
    report = dvit.verify(engine, source, num_images=8)
    assert report.passed, str(report)
    answer, _ = answers(case)
    plain = dvit.load_reference(source, **options(case)).to(engine.dtype)
    ours, theirs = engine(case_images(case)), evaluate(plain, case_images(case)).logits
    assert rms(ours - answer) < 2 * rms(theirs - answer)


@pytest.mark.parametrize("case", NPZ)
def test_an_npz_is_answered_with_the_exact_gelu_where_that_is_assumed(case, written):
    answer, _ = answers(case, exact_gelu=True)
    given = options(case) | {"assume": {"act": "gelu"}}
    engine = dvit.convert(written(case), device="cpu", **given)
    assert farthest(engine(case_images(case)), answer) < 2e-5
    assert farthest(engine(case_images(case)), answers(case)[0]) > 2e-5 or "tame" in case


def test_three_owners_resample_one_file_in_three_ways(written):
    case, rules = "dinov2-hub-tiny-at-56x112", {
        "meta": "bicubic, by the factor of (n + 0.1) patches, as DINOv2",
        "huggingface": "bicubic without antialiasing, as Hugging Face",
        "timm": "bicubic with antialiasing, as timm",
    }  # fmt: skip
    images, found, given = case_images(case), {}, assumptions(case)
    for rule in (None, *rules):
        assume = given | ({"resample": rule} if rule else {})
        engine = dvit.convert(written(case), image_size=(56, 112), assume=assume, device="cpu")
        found[rule] = engine(images)
        (said,) = (note.why for note in engine.notes if note.what == "pos_embed" and note.value == "resampled")
        assert said.startswith(rules[rule or "meta"])
        assert said.endswith("from 84x84 to 56x112")
    assert torch.equal(found[None], found["meta"])
    assert farthest(found["meta"], answers(case)[0]) < 2e-5
    for one, other in itertools.combinations(rules, 2):
        assert farthest(found[one], found[other]) > 1e-2
