"""A keep ratio that is zero or one for a whole epoch is a warning that names the cure."""

import re

import pytest
from small_training import arguments, write_dense, write_folder

from dvit_infer.cli import train
from dvit_infer.training.reports import collapse_warnings
from dvit_infer.training.settings import Settings

RATIOS = (0.7, 0.49, 0.343)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ((0.7, 0.5, 0.3), []),
        ((0.5, 0.25, 0.125), []),  # as new predictors begin
        ((0.99, 0.02, 0.01), []),
        ((0.7, 0.001, 0.0), ["stages 1, 2 kept no patch in the whole epoch, 0.49, 0.343 is wanted"]),
        ((1.0, 0.6, 0.5), ["stage 0 kept every patch in the whole epoch, 0.7 is wanted"]),
        ((1.0, 0.0, 0.0), ["stages 1, 2 kept no patch", "stage 0 kept every patch"]),
    ],
)
def test_what_is_said(kept, says):
    found = collapse_warnings(kept, RATIOS, Settings(lr=0.5, ratio_weight=3.0))
    assert len(found) == len(says)
    for warning, text in zip(found, says, strict=True):
        assert warning.startswith(text)
        assert warning.endswith("start anew with a lower --lr (now 0.5) or a higher --ratio-weight (now 3)")


def test_a_ratio_that_is_to_be_extreme_is_none():
    assert collapse_warnings((0.999, 0.004), (0.996, 0.002), Settings()) == ()


def test_steps_far_too_large_end_in_the_warning(tmp_path, capsys):
    dense, folder = write_dense(tmp_path / "dense.pth"), write_folder(tmp_path / "images")
    more = ["--lr", "20", "--freeze-epochs", "9", "--epochs", "3"]
    assert train.main(arguments(dense, folder, tmp_path / "out.pth", *more)) == 0
    warnings = re.findall(r"^warning: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert any("kept no patch" in warning or "kept every patch" in warning for warning in warnings)


def test_the_weight_counts(tmp_path, capsys):
    dense, folder = write_dense(tmp_path / "dense.pth"), write_folder(tmp_path / "images")
    losses = []
    for weight in ("0", "30"):
        more = ["--ratio-weight", weight, "--epochs", "1"]
        assert train.main(arguments(dense, folder, tmp_path / "out.pth", *more)) == 0
        said = capsys.readouterr()
        assert said.err == ""
        total, ratio = re.search(r"loss ([\d.]+) .*ratio ([\d.]+)", said.out).groups()
        losses.append((float(total), float(ratio)))
    assert losses[1][0] - losses[0][0] == pytest.approx(10 * losses[1][1], abs=0.5)
