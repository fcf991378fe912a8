"""Launches as data: `collecting` records what launchers would run, in order, and runs nothing."""

import torch
from dvit_kernels.launch import Launch, collecting
from dvit_kernels.layer_norm import launch_layer_norm, launch_row_stats
from dvit_kernels.linear import launch_linear
from kernel_helpers import collected


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.__name__ for launch in launches]


def test_launches_are_collected_in_order_and_not_run(monkeypatch):
    monkeypatch.setattr(Launch, "run", None)
    x = torch.empty(5, 64, device="meta")
    with collecting() as outer:
        launch_layer_norm(x)
        inner = collected(launch_linear, x, torch.empty(32, 64, device="meta"))
        stats = launch_row_stats(x)
    assert names(outer) == ["_layer_norm_kernel", "_row_stats_kernel"]
    assert names(inner) == ["_linear_kernel"]
    assert outer[1].arguments["stats_ptr"] is stats


def test_an_error_inside_ends_the_collection(monkeypatch):
    ran = []
    monkeypatch.setattr(Launch, "run", lambda launch: ran.append(launch))
    try:
        with collecting() as launches:
            launch_linear(torch.zeros(2, 64), torch.zeros(32, 64), stats_block=48)
    except ValueError:
        launch_layer_norm(torch.zeros(2, 64))
    assert (names(launches), names(ran)) == ([], ["_layer_norm_kernel"])
