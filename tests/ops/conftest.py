"""The native library, built once, and tests in which it runs prune_tokens."""

import pytest
from native_library import build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("native"), "-DDVIT_CUDA=OFF")


@pytest.fixture
def _library(built, monkeypatch):
    monkeypatch.setenv("DVIT_NATIVE_LIBRARY", built)


@pytest.fixture
def _native(_library, monkeypatch):
    monkeypatch.setenv("DVIT_PRUNE", "native")
