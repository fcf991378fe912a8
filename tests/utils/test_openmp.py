"""How long OpenMP's threads spin: set before torch is imported, unless the user has chosen."""

import platform
import subprocess
import sys

import pytest
from commands import ENV

from dvit_infer.utils.openmp import SPIN_COUNT, shorten_spins

SET = {"GOMP_SPINCOUNT": SPIN_COUNT}


@pytest.mark.parametrize(
    ("before", "loaded", "machine", "after"),
    [
        ({}, (), "x86_64", SET),
        ({"OMP_NUM_THREADS": "2"}, (), "AMD64", {"OMP_NUM_THREADS": "2", **SET}),
        ({}, ("torch",), "x86_64", {}),
        ({}, (), "aarch64", {}),
        ({"GOMP_SPINCOUNT": "7"}, (), "x86_64", {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, (), "x86_64", {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_the_user_decides(before, loaded, machine, after):
    environment = dict(before)
    shorten_spins(environment, loaded, machine)
    assert environment == after


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="set there alone")
@pytest.mark.parametrize(
    ("imports", "count"), [("import dvit_infer, torch", SPIN_COUNT), ("import torch, dvit_infer", "300000")]
)
def test_openmp_reads_it(imports, count):
    """GNU OpenMP prints its settings when it is loaded."""
    env = {name: value for name, value in ENV.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", imports]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**env, "OMP_DISPLAY_ENV": "verbose"}
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch was built with another OpenMP")
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
