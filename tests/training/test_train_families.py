"""dvit-train on the other kinds of dense models: LV-ViT, DeiT with a distillation token."""

import pytest
import torch
from small_training import arguments, trained, write_dense, write_folder

import dvit_infer as dvit
from dvit_infer.cli import train
from dvit_infer.models.vit.lvvit import LVViT
from dvit_infer.models.vit.plain import PlainViT

STEM = {"stem_dim": 8, "mlp_dim": 96, "skip_lam": 2.0}


@pytest.mark.parametrize(
    ("make", "shape", "arch"),
    [(LVViT, STEM, "dynamicvit-lvvit-32x4"), (PlainViT, {"num_prefix": 2}, "dynamicvit-deit-32x4-distilled")],
)
def test_becomes_dynamic_and_is_read_back(make, shape, arch, tmp_path, capsys):
    dense = write_dense(tmp_path / "dense.pth", make, **shape)
    folder, out = write_folder(tmp_path / "images"), tmp_path / "out.pth"
    assert train.main(arguments(dense, folder, out, "--val", folder)) == 0
    assert "epoch 2 of 2: loss" in capsys.readouterr().out
    engine = dvit.convert(out, device="cpu")
    assert engine.config.arch == arch
    assert engine.config.num_keep == (11, 7, 5)
    assert dvit.verify(engine, out).passed
    before, after = trained(dense), trained(out)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for key, value in before.items():
        assert torch.equal(after[key], value) == key.endswith(statistics), key
