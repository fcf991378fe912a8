"""What workers inherit: their share of the CPUs, and a folder of metrics that is removed."""

import os
from pathlib import Path

import pytest

from dvit_infer.serve import workers
from dvit_infer.serve.metrics import SHARED
from dvit_infer.utils.threads import SETTINGS


@pytest.mark.parametrize(("cpus", "count", "threads"), [(8, 2, "4"), (8, 3, "2"), (2, 4, "1")])
def test_workers_share_the_cpus(monkeypatch, cpus, count, threads):
    monkeypatch.setattr(workers, "allowed_threads", lambda: cpus)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with workers.worker_environment(count):
        assert os.environ["OMP_NUM_THREADS"] == threads
        folder = Path(os.environ[SHARED])
        assert folder.is_dir()
    assert not folder.exists()
    assert SHARED not in os.environ
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_number_of_threads_that_is_set_stays(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with workers.worker_environment(2):
        assert "OMP_NUM_THREADS" not in os.environ
