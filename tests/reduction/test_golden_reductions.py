"""EViT and ToMe answer as their owners' code does: reference and engines."""

import pytest
import torch
from golden_reductions import CASES, EVERY_CASE, answers, case_images, content, options, same_choice

import dvit_infer as dvit

BACKENDS = ["torch"]


def check(case, answer, kept, positions, margin, num_prefix):
    """Assert the owner's choices by the margin rule, and its answer within 2e-5 wherever the choices are its own."""
    same, clear = same_choice(case, kept, positions, num_prefix), (margin > 1e-5).all(dim=1)
    assert same[clear].all()
    theirs = answers(case)[CASES[case]["answer"]]
    torch.testing.assert_close(answer[same], theirs[same], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_reference_and_engines_answer_as_the_owner(case):
    images = case_images(case)
    with torch.no_grad():
        found = dvit.load_reference(content(case), **options(case)).evaluate(images)
    theirs = answers(case)
    if "margin" in theirs and CASES[case]["pool"] != "map":  # without class token the order of the others counts too
        torch.testing.assert_close(found.margin, theirs["margin"], atol=5e-6, rtol=0)
    for backend in BACKENDS:
        engine = dvit.convert(content(case), device="cpu", backend=backend, **options(case))
        body = engine.config.body
        check(case, found.logits, found.kept, found.positions, found.margin, body.num_prefix)
        logits, kept = engine(images, return_kept=True)
        tokens, positions = engine.tokens(images)
        check(case, logits, kept, positions, found.margin, body.num_prefix)
        torch.testing.assert_close(engine(images, kept=found.kept), found.logits, atol=2e-5, rtol=0)
        assert tokens.shape[1] == body.num_prefix + positions.shape[1]
