"""How long PyTorch's OpenMP threads spin at a barrier: a setting of the environment, read when torch is loaded."""

import os
import platform
import sys
from collections.abc import Container, MutableMapping

# GNU OpenMP, which PyTorch's builds for Linux bring along, lets a thread spin 300,000 times before it sleeps. Each time
# is a `pause`, of up to 140 cycles: over 10 ms, in which a thread burns the time that the thread it waits for needs to
# be scheduled, once another process wants a core. 10,000 times are about half a millisecond, longer than the gap
# between two parallel loops of a model, so that its threads still spin from loop to loop.
# DynamicViT-DeiT-S/0.7, batch 1, float32, two threads on two cores of a Xeon (torch 2.13, interleaved), speed over the
# default; the columns with busy processes are medians of five rounds, in which other jobs ran on the machine too:
#
#   times   idle     1       2       3 other processes busy
#       0   0.70 x   4.2 x   7.1 x   16 x     (each barrier wakes its threads by the kernel)
#    3000   0.83 x   3.3 x   6.4 x   14 x
#   10000   0.99 x   2.5 x   4.4 x   12 x     (28.5 ms idle; 144, 180, 272 ms in the mean)
#   30000            1.6 x   1.7 x    7 x
SPIN_COUNT = "10000"
_SETTINGS = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"  # what a user may have chosen


def shorten_spins(
    environment: MutableMapping[str, str] = os.environ, loaded: Container[str] = sys.modules, machine: str = ""
) -> None:
    """Set GOMP_SPINCOUNT, unless torch was imported before, which is too late, or the user set the policy.

    Processes started later inherit it. Only on x86: elsewhere a spin takes a cycle or two, and the default is short.

    Args:
        machine: the architecture; by default this one's.
    """
    chosen = any(name in environment for name in _SETTINGS)
    if not chosen and "torch" not in loaded and (machine or platform.machine()) in ("x86_64", "AMD64"):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
