"""What `pytest --emulate` changes: tests of kernels run on compiled code, which kernels/emulate executes."""

import os
import re
from pathlib import Path

import pytest

# What Triton 3.7 makes of these for Hopper, the emulation refuses: the code may be right only by luck of timing.
REGISTERS = "registers of a product on its way are written over, triton-lang/triton issue 9433"
BUFFERS = (
    "a buffer that a product on its way reads is written over: of x, loaded for its sums too, there is one too few"
)
HAZARDS = {
    r"patch_embedding_kernels\.py::test_bytes\[sm90": REGISTERS,
    r"patch_embedding_kernels\.py::test_any_strides\[sm90": REGISTERS,
    r"patch_embedding_kernels\.py::test_tokens\[sm90-\w+-(3-3-32-48|1-3-28-42|3-3-24-16|1-16-16-8)-.*-True": REGISTERS,
    r"prune_tokens_kernels\.py::test_tiles_of_large_batches\[sm90": BUFFERS,
    r"linear_kernels\.py::test_every_tile_finds_statistics\[sm90-\w+-tile[012]": BUFFERS,
    r"linear_tma_kernels\.py::test_what_tma_cannot_read_takes_the_plain_kernel\[sm90": BUFFERS,
}
CACHE = Path(__file__).parent.parent / "build" / "emulate"  # Triton's, kept between runs


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
    from emulate.errors import EmulationError

    for item in items:
        for name, reason in HAZARDS.items():
            if re.search(name, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, raises=EmulationError, strict=True))


def replace_launches(item: pytest.Item, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run launches compiled for the GPU that the test's parameters name."""
    from dvit_kernels.launch import Launch
    from emulate import launching

    marker = item.get_closest_marker("emulated")
    capability = marker.args[0] if marker and marker.args else 80
    monkeypatch.setattr(Launch, "run", lambda launch: launching.run(launch, capability))
