"""EViT and ToMe answer as their owners' code does: reference and engines."""

from importlib.util import find_spec

import pytest
import torch
from golden_reductions import CASES, EVERY_CASE, QUICK, answers, case_images, content, options, same_choice

import dvit_infer as dvit

BACKENDS = {"torch": 2e-5, "openvino": 1e-4}  # farthest from the owner
EVERYWHERE = [
    pytest.param(
        case,
        backend,
        marks=pytest.mark.large if case not in QUICK else [] if backend == "torch" else pytest.mark.slow,
        id=f"{case}-{backend}",
    )
    for case in CASES
    for backend in BACKENDS
    if find_spec(backend) and not (backend == "openvino" and "vit_base" in case and "siglip" not in case)
]


def check(case, answer, kept, positions, margin, atol, num_prefix):
    """Assert the owner's choices by the margin rule, and its answer wherever the choices are its own."""
    same, clear = same_choice(case, kept, positions, num_prefix), (margin > 1e-5).all(dim=1)
    assert same[clear].all()
    theirs = answers(case)[CASES[case]["answer"]]
    torch.testing.assert_close(answer[same], theirs[same], atol=atol, rtol=0)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_reference_answers_as_the_owner(case):
    reference, theirs = dvit.load_reference(content(case), **options(case)), answers(case)
    with torch.no_grad():
        found = reference.evaluate(case_images(case))
    check(case, found.logits, found.kept, found.positions, found.margin, 2e-5, reference.num_prefix)
    if "margin" in theirs and CASES[case]["pool"] != "map":  # without class token the order of the others counts too
        torch.testing.assert_close(found.margin, theirs["margin"], atol=5e-6, rtol=0)


@pytest.mark.parametrize(("case", "backend"), EVERYWHERE)
def test_an_engine_answers_as_the_owner(case, backend):
    images, atol = case_images(case), BACKENDS[backend]
    with torch.no_grad():
        found = dvit.load_reference(content(case), **options(case)).evaluate(images)
    engine = dvit.convert(content(case), device="cpu", backend=backend, **options(case))
    num_prefix = engine.config.body.num_prefix
    logits, kept = engine(images, return_kept=True)
    tokens, positions = engine.tokens(images)
    check(case, logits, kept, positions, found.margin, atol, num_prefix)
    torch.testing.assert_close(engine(images, kept=found.kept), found.logits, atol=atol, rtol=0)
    assert tokens.shape[1] == num_prefix + positions.shape[1]
