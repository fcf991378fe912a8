"""A small dense model, images to train it on, and a run that is at its end, for the tests of dvit-train."""

import pytest
from small_training import arguments, write_dense, write_folder

from dvit_infer.cli import train


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "dense.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(dense, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.pth"
    assert train.main(arguments(dense, folder, out)) == 0
    return out
