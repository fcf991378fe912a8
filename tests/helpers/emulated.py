"""What `pytest --emulate` changes: tests of kernels run on compiled code, which kernels/emulate executes."""

import os
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / "build" / "emulate"  # Triton's, kept between runs


def configure() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    import kernel_helpers  # not before: it imports Triton

    kernel_helpers.WHERE[:] = kernel_helpers.EMULATED


def select(config: pytest.Config, items: list[pytest.Item], quick: bool) -> None:
    """Keep what runs kernels, or of that what is marked as quick."""
    wanted = {"quick"} if quick else {"emulated", "interpreter"}
    kept = [item for item in items if wanted & set(item.keywords) and "gpu" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def replace_launches(item: pytest.Item, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run launches compiled for the GPU that the test's parameters name."""
    from dvit_kernels.launch import Launch
    from emulate import launching

    marker = item.get_closest_marker("emulated")
    capability = marker.args[0] if marker and marker.args else 80
    monkeypatch.setattr(Launch, "run", lambda launch: launching.run(launch, capability))
