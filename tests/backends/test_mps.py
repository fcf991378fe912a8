"""Apple's GPUs, by plain PyTorch. No such device is here: these tests run the code for it on a CPU."""

import pytest
import torch
from commands import fails
from drawn import draw_all
from golden_cases import answers, case_images, official_checkpoint, options, same_kept
from pretended_mps import MPS, on_a_mac  # noqa: F401 (fixtures are found by being there)
from small_training import arguments, write_dense, write_folder

import dvit_infer as dvit
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.cli import predict, train
from dvit_infer.images.stream import batch_size
from dvit_infer.onnx.engine import onnx_device
from dvit_infer.utils.devices import free_memory, micro_batch, resolve_device, resolve_dtype, timed

TINY = "tiny-deit-r0.7-s1"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one here")
@pytest.mark.usefixtures("_empty_folder")
def test_where_there_is_none_it_says_so(checkpoint, tmp_path, capsys):
    draw_all(tmp_path / "images", 1)
    line = fails(predict, [checkpoint, tmp_path / "images", "--device", "mps"], capsys)
    assert line == "error: --device: mps: not available here; use cpu instead\n"
    with pytest.raises(dvit.InputError, match="device: xpu is not supported; cpu, cuda and mps are"):
        resolve_device("xpu")


def test_it_is_never_the_default(on_a_mac):  # noqa: F811
    with on_a_mac():
        assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert resolve_device("mps") == resolve_device("mps:0") == resolve_device(MPS) == MPS
        assert resolve_dtype(None, MPS) == torch.float32
        assert batch_size(None, MPS) == 16
        assert micro_batch(MPS, 196, 384) > 0
        assert free_memory(MPS) == 6 << 20
        assert timed(lambda: 3, MPS)[0] == 3
        with pytest.raises(dvit.InputError, match="device: mps:1 does not exist on this machine; use mps instead"):
            resolve_device("mps:1")
        with pytest.raises(dvit.InputError, match="device: ONNX Runtime runs on cpu or cuda here, not on mps"):
            onnx_device("mps")


def test_a_training_runs_there(on_a_mac, tmp_path, capsys, monkeypatch):  # noqa: F811
    dense, folder = write_dense(tmp_path / "dense.pth"), write_folder(tmp_path / "images")
    argv = arguments(dense, folder, tmp_path / "out.pth", "--epochs", "1", "--device", "mps", "--val", folder)
    with on_a_mac():
        assert train.main(argv) == 0
        assert "top-1" in capsys.readouterr().out
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert train.main(argv) == 2
    assert "--device: mps trains in one process" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_engine_runs_plain_pytorch(dtype, on_a_mac):  # noqa: F811
    expected, kept, margin = answers(TINY)
    with on_a_mac():
        engine = dvit.convert(official_checkpoint(TINY), device="mps", dtype=dtype, **options(TINY))
        assert type(engine.runner) is TorchRunner  # no CUDA graphs
        assert engine.graph.runtime == "PyTorch"
        assert engine.device == MPS
        logits, found = engine(case_images(TINY), return_kept=True)
        given = engine(case_images(TINY), kept=kept)
        engine.warm_up([2])
        assert engine.features(case_images(TINY)).shape == (len(expected), 64)
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    assert (given - expected).abs().max() < tolerance
    if dtype == "float32":
        assert (logits - expected).abs().max() < tolerance
        assert same_kept(found, kept, margin)


def test_out_of_memory_runs_fewer_images_at_a_time(on_a_mac, monkeypatch):  # noqa: F811
    run, sizes = TorchRunner.run, []

    def small(self, images, *given):
        sizes.append(len(images))
        if len(images) > 1:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB).")
        return run(self, images, *given)

    with on_a_mac():
        engine = dvit.convert(official_checkpoint(TINY), device="mps", **options(TINY))
        monkeypatch.setattr(TorchRunner, "run", small)
        logits = engine(case_images(TINY))
        assert engine.micro_batch == 1
        assert (logits - answers(TINY)[0]).abs().max() < 2e-5

        def none(self, images, *given):
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB).")

        monkeypatch.setattr(TorchRunner, "run", none)
        with pytest.raises(MemoryError, match=r"fits in what is free on mps:0, 6 MiB"):
            engine(case_images(TINY))


def test_required_kernels_are_refused(on_a_mac, monkeypatch):  # noqa: F811
    with on_a_mac(), monkeypatch.context() as patched:
        patched.setenv("DVIT_KERNELS", "require")
        with pytest.raises(dvit.InputError, match="kernels are for NVIDIA GPUs, not for mps"):
            dvit.convert(official_checkpoint(TINY), device="mps", **options(TINY))
