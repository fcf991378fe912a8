"""A tiny engine, and a server of it."""

import pytest
from commands import SIZE
from served import serving

import dvit_infer as dvit


@pytest.fixture(scope="session")
def engine(checkpoint):
    return dvit.convert(checkpoint, device="cpu", backend="torch", **SIZE)


@pytest.fixture(scope="package")
def port(engine, checkpoint):
    """Of a server with a small body limit and little patience."""
    with serving({"tiny": engine}, checkpoint, max_batch=4, max_body=400_000, body_timeout_s=0.3) as port:
        yield port
