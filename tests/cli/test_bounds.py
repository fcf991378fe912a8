"""A number over its bound: the message names the option and the bound."""

import pytest
from commands import fails
from drawn import draw_all
from small_training import arguments

from dvit_infer.cli import bench, convert, predict, train
from dvit_infer.errors import InputError
from dvit_infer.utils.bounds import check_bound


@pytest.mark.usefixtures("_empty_folder")
@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("--lr", "1e6", "1e+06 is over the bound; a number below 1e+06"),
        ("--lr", "inf", "inf is over the bound; a number below 1e+06"),
        ("--clip", "1e6", "1e+06 is over the bound; a number below 1e+06"),
        ("--min-lr", "2e6", "2e+06 is over the bound; a number below 1e+06"),
        ("--weight-decay", "1e9", "1e+09 is over the bound; a number below 1e+06"),
        ("--warmup-epochs", "1e7", "1e+07 is over the bound; a number below 1e+06"),
        ("--mixup", "1e6", "1e+06 is over the bound; a number below 1e+06"),
        ("--cutmix", "inf", "inf is over the bound; a number below 1e+06"),
        ("--epochs", "1000001", "1000001 is over the bound; a number at most 1000000"),
        ("--freeze-epochs", "1000001", "1000001 is over the bound; a number at most 1000000"),
        ("--batch", "16777217", "16777217 is over the bound; a number at most 16777216"),
        ("--accumulate", "16777217", "16777217 is over the bound; a number at most 16777216"),
        ("--batch", "9" * 400, "a number of 1329 bits is over the bound; a number at most 16777216"),
        ("--lr", "nan", "nan is not a positive number"),
        ("--weight-decay", "nan", "nan is negative or not a number"),
    ],
)
def test_of_a_training(option, value, bound, dense, folder, capsys):
    assert f"error: {option}: {bound}" in fails(train, [*arguments(dense, folder, "out.pth"), option, value], capsys)


@pytest.mark.usefixtures("_empty_folder")
@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ("num_heads=1099511627776", "num_heads: 1099511627776 is over the bound; a number below 1099511627776"),
        ("eps=1e30", "eps: 1e+30 is over the bound; a number below 1e+30"),
        ("eps=1e-31", "eps: 1e-31 is under the bound; a number above 1e-30"),
        ("mean=1e31:0.5:0.5", "mean: 1e+31 is over the bound; a number below 1e+30"),
        ("mean=0.5:nan:0.5", "mean: (0.5, nan, 0.5) is not three numbers"),
    ],
)
def test_of_an_assumption(given, bound, dense, capsys):
    assert f"error: --assume {bound}" in fails(convert, [dense, "--assume", given], capsys)


@pytest.mark.usefixtures("_empty_folder")
def test_of_a_batch(dense, tmp_path, capsys):
    draw_all(tmp_path / "images", 1)
    expected = "error: --batch: 16777217 is over the bound; a number at most 16777216"
    assert expected in fails(bench, [dense, "--batch", "16777217"], capsys)
    assert expected in fails(predict, [dense, tmp_path / "images", "--batch", "16777217"], capsys)


def test_the_bound_itself():
    check_bound("x", 3, 3)
    with pytest.raises(InputError, match="x: 3 is over the bound; a number below 3 is expected"):
        check_bound("x", 3, 3, excluded=True)
