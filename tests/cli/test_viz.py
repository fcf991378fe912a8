"""Images of what was kept: the library's against the engine's kept sets, and dvit-viz as a user types it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import TINY, fails, run
from golden_cases import state_dict
from PIL import Image

import dvit_infer as dvit
from dvit_infer.cli import viz as command
from dvit_infer.evaluate.sheet import viridis
from dvit_infer.evaluate.visualize import draw_heat_map, draw_kept, draw_seen, draw_shares, keep_shares, look
from dvit_infer.models.preprocessing import preprocess_for

pytestmark = pytest.mark.usefixtures("_empty_folder")


def pil_image(seed: int, size: tuple[int, int] = (260, 240)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def wide(checkpoint: Path) -> dvit.Engine:
    return dvit.convert(checkpoint, assume={"num_heads": 2}, image_size=(192, 256), device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "pets"
    where.mkdir()
    for seed in range(3):
        pil_image(seed).save(where / f"p{seed}.png")
    return where


def panels(sheet: Image.Image, rows: int, columns: int, size: tuple[int, int]) -> list[list[np.ndarray]]:
    """The panels of a sheet, found by what its documentation says: a gap, columns and rows evenly spaced."""
    height, width = size
    text = max(12, width // 16)
    gap, line = text // 2, text * 3 // 2
    assert sheet.width == gap + columns * (width + gap)
    pixels = np.asarray(sheet)
    tops = [gap + row * (height + 2 * line + text) + line for row in range(rows)]
    lefts = [gap + column * (width + gap) for column in range(columns)]
    return [[pixels[top : top + height, left : left + width] for left in lefts] for top in tops]


@pytest.mark.parametrize(
    ("options", "size", "scale"),
    [
        ({}, (224, 224), 1),
        ({"image_size": (192, 256)}, (192, 256), 1),
        ({"image_size": (96, 64), "prune_at": (0, 1, 2)}, (96, 64), 3),
        ({"keep_rate": 0.4}, (224, 224), 1),
        ({"keep_rate": 1.0}, (224, 224), 1),
    ],
)
def test_dropped_patches_are_dimmed_and_no_others(checkpoint, options, size, scale):
    engine = dvit.convert(checkpoint, assume={"num_heads": 2}, device="cpu", **options)
    pil_images = [pil_image(1), pil_image(2, (90, 300))]
    sheet = draw_kept(engine, pil_images)
    preprocess = preprocess_for(engine.config)
    images = np.stack([preprocess(one) for one in pil_images])
    _, kept = engine(torch.from_numpy(images), return_kept=True)
    drawn = panels(sheet, 2, 1 + len(kept), (size[0] * scale, size[1] * scale))
    for row, image in enumerate(images.transpose(0, 2, 3, 1)):
        original, *stages = [panel[::scale, ::scale] for panel in drawn[row]]
        assert all((panel == panel[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)).all() for panel in drawn[row])
        np.testing.assert_array_equal(original, image)
        for stage, index in zip(stages, kept, strict=True):
            mask = np.zeros(engine.config.num_patches, bool)
            mask[index[row]] = True
            mask = mask.reshape(engine.config.grid).repeat(16, 0).repeat(16, 1)
            np.testing.assert_array_equal(stage[mask], image[mask])
            dimmed = image[~mask] * 0.2 + 224 * 0.8
            np.testing.assert_allclose(stage[~mask], dimmed, atol=0.51)


def test_what_it_saw(wide, tmp_path):
    pil_image(3).save(tmp_path / "three.png")
    images = torch.from_numpy(np.stack([preprocess_for(wide.config)(pil_image(seed)) for seed in (3, 4)]))
    seen = look(wide, [images[:1], images[1:]])
    probabilities = wide(images).softmax(dim=1)
    for one, expected in zip(seen, probabilities, strict=True):
        assert one.label == f"class {expected.argmax()}"
        assert one.probability == pytest.approx(expected.max().item(), rel=1e-4)
        assert [stage.shape for stage in one.kept] == [wide.config.grid] * 3
        assert [stage.sum() for stage in one.kept] == list(wide.config.num_keep)
    assert seen[0].source.size == (256, 192)
    assert draw_kept(wide, [tmp_path / "three.png", pil_image(4)]).tobytes() == draw_seen(seen, wide.config).tobytes()
    best = int(probabilities[0].argmax())
    assert look(wide, [images[:1]], {best: "cat"})[0].label == "cat"
    assert look(wide, [images[:1]], {best + 1: "cat"})[0].label == f"class {best}"


def test_long_and_strange_labels_stay_on_the_sheet(wide):
    labels = [dict.fromkeys(range(10), name) for name in ("x" * 5000, "a\nb\x1b[31m", "\u65e5\u672c", "")]
    sizes = {draw_kept(wide, [pil_image(3)], names).size for names in labels}
    assert len(sizes) == 1
    edge = np.asarray(draw_kept(wide, [pil_image(3)], labels[0]))[:, -8:]
    assert (edge == 255).all()


def test_the_heat_map_counts(wide):
    pil_images = [pil_image(seed) for seed in range(19)]
    images = torch.from_numpy(np.stack([preprocess_for(wide.config)(one) for one in pil_images]))
    _, kept = wide(images, return_kept=True)
    counts = [np.bincount(stage.flatten(), minlength=192).reshape(12, 16) for stage in kept]
    shares, count = keep_shares(wide, (images[start : start + 8] for start in range(0, 19, 8)))
    assert count == 19
    np.testing.assert_allclose(shares, np.stack(counts) / 19)
    sheet = draw_heat_map(wide, (one for one in pil_images))  # a stream
    assert sheet.tobytes() == draw_shares(shares, count, wide.config).tobytes()
    (drawn,) = panels(sheet, 1, 3, (192, 256))
    for panel, expected in zip(drawn, counts, strict=True):
        np.testing.assert_array_equal(panel, viridis(expected / 19).repeat(16, 0).repeat(16, 1))


def test_colours_from_none_to_all():
    colors = viridis(np.array([0.0, 0.5, 1.0]))
    assert colors.tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37]]
    assert (np.diff(viridis(np.linspace(0, 1, 50)).astype(int) @ [2, 7, 1]) > 0).all()  # ever lighter


def test_nothing_to_draw(wide, checkpoint, tmp_path):
    dense = dvit.convert(checkpoint, assume={"num_heads": 2}, method="none", device="cpu")
    for draw in (draw_kept, draw_heat_map):
        with pytest.raises(dvit.InputError, match=r"^method: none"):
            draw(dense, [pil_image(1)])
        with pytest.raises(dvit.InputError, match=r"^images: there are none"):
            draw(wide, [])
        with pytest.raises(dvit.InputError, match=r"missing\.png"):
            draw(wide, [pil_image(1), tmp_path / "missing.png"])


def test_a_grid_of_images_from_a_folder(checkpoint, folder, capsys):
    names = {str(index): [f"n{index}", f"pet {index}"] for index in range(10)}
    Path("classes.json").write_text(json.dumps(names))
    argv = [str(checkpoint), str(folder), *TINY, "--classes", "classes.json"]
    assert command.main(argv) == 0
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert out.err == ""
    assert len(lines) == 4
    for seed, line in enumerate(lines[:3]):
        found = rf"{re.escape(str(folder / f'p{seed}.png'))}: pet \d \d+\.\d%, kept 137, 96, 67 of 196"
        assert re.fullmatch(found, line)
    with Image.open("p0.kept.png") as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        assert lines[3] == f"wrote p0.kept.png ({sheet.width}x{sheet.height})"
    assert sorted(os.listdir()) == ["classes.json", "p0.kept.png"]


def test_options_reach_the_engine_and_the_crop(checkpoint, folder, capsys):
    argv = [str(folder / "p1.png"), *TINY, "--image-size", "192x256", "--keep-rate", "0.5", "--dtype", "bfloat16"]
    assert command.main([str(checkpoint), *argv, "-o", "a.PNG"]) == 0
    assert "kept 96, 48, 24 of 192" in capsys.readouterr().out
    assert command.main([str(checkpoint), *argv, "-o", "b.png", "--crop-pct", "0.5"]) == 0
    a, b = (panels(Image.open(name), 1, 4, (192, 256))[0][0] for name in ("a.PNG", "b.png"))
    assert not np.array_equal(a, b)


def test_saved_files_are_read_too(checkpoint, folder, capsys):
    dvit.convert(checkpoint, assume={"num_heads": 2}, device="cpu").save("tiny.safetensors")
    assert command.main(["tiny.safetensors", str(folder / "p1.png"), "--device", "cpu"]) == 0
    assert "wrote p1.kept.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["p1.png", "p[1].png", ""])
def test_without_a_model_it_takes_the_one_that_comes_along(name, folder, capsys):
    assert command.main([str(folder / name), "-o", "kept.png", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no MODEL was given: using a small model trained on cluttered digits\n")
    assert "kept 44, 31, 21 of 64" in out
    assert "--device" not in fails(command, ["model.pth", "--device", "cpu"], capsys)


def test_a_heat_map_of_a_folder_counts_and_names_what_it_cannot_read(checkpoint, folder, capsys, monkeypatch):
    (folder / "deeper").mkdir()
    (folder / "deeper" / "text.jpg").write_text("hello")
    (folder / "p1b.png").write_bytes((folder / "p1.png").read_bytes()[:200])
    assert command.main([str(checkpoint), str(folder), *TINY, "--heat-map"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in out[:2]] == [
        ["cannot be read", str(folder / "deeper" / "text.jpg")],
        ["cannot be read", str(folder / "p1b.png")],
    ]
    assert out[2] == "3 images, 2 that cannot be read; kept 137, 96, 67 of 196"
    assert out[3].startswith("wrote pets.heat.png (")
    engine = dvit.convert(checkpoint, assume={"num_heads": 2}, device="cpu")
    expected = draw_heat_map(engine, [folder / f"p{seed}.png" for seed in range(3)])
    assert Image.open("pets.heat.png").tobytes() == expected.tobytes()
    monkeypatch.setattr(command, "NAMED", 1)
    assert command.main([str(checkpoint), str(folder / "p*.png"), str(folder), *TINY, "--heat-map"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:3] == ["cannot be read: 2 more", "6 images, 3 that cannot be read; kept 137, 96, 67 of 196"]
    assert "p0.heat.png" in os.listdir()  # of a pattern: after its first image
    (folder / "p0.png").write_bytes(b"")
    assert command.main([str(checkpoint), str(folder), *TINY, "--heat-map", "--workers", "0", "--batch", "1"]) == 0
    assert "2 images, 3 that cannot be read" in capsys.readouterr().out


def test_more_images_than_a_grid_holds(checkpoint, folder, capsys):
    line = fails(command, [checkpoint, *[folder / "p0.png"] * 65, *TINY], capsys)
    assert "more than 64" in line
    assert "--heat-map" in line


def test_odd_images_go_through_the_shared_decoder(checkpoint, tmp_path, capsys):
    base = pil_image(5)
    base.quantize(256).save(tmp_path / "palette.png")
    grey = np.asarray(base.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.png")
    base.save(name)
    argv = [str(checkpoint), name, *(str(tmp_path / n) for n in ("palette.png", "deep.png", "turned.jpg"))]
    assert command.main([*argv, *TINY]) == 0
    assert os.listdir() == ["caf__.kept.png"]
    rows = panels(Image.open("caf__.kept.png"), 4, 4, (224, 224))
    plain, palette, deep, turned = (row[0].astype(int) for row in rows)
    assert abs(plain - turned).mean() < 10  # the right way up
    assert abs(plain - palette).mean() < 25
    assert (deep[..., 0] == deep[..., 1]).all()
    assert abs(plain @ [0.299, 0.587, 0.114] - deep[..., 0]).mean() < 3
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{tmp_path}/caf??.png: ")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["-o", "x.jpg"], "--out: x.jpg"),
        (["-o", ""], "--out"),
        (["-o", "nowhere/x.png"], "--out"),
        (["-o", "."], "--out"),
        (["--crop-pct", "2"], "--crop-pct"),
        (["--crop-pct", "nan"], "--crop-pct"),
        (["--crop-pct", "x"], "--crop-pct"),
        (["--classes", "none.json"], "none.json"),
        (["--batch", "0"], "--batch"),
        (["--workers", "-1"], "--workers"),
        (["--method", "none"], "--method"),
        (["--method", "magic"], "--method"),
        (["--keep-rate", "0"], "--keep-rate"),
        (["--image-size", "225"], "--image-size"),
        (["--device", "tpu"], "--device"),
        (["--dtype", "int4"], "--dtype"),
        (["--assume", "heads=2"], "--assume"),
        (["--surprise"], "--surprise"),
    ],
)
def test_bad_options(argv, named, checkpoint, folder, capsys):
    assert named in fails(command, [checkpoint, folder / "p0.png", *TINY, *argv], capsys)


@pytest.mark.parametrize("heat_map", [[], ["--heat-map"]])
def test_bad_images(heat_map, checkpoint, folder, tmp_path, capsys):
    bad = tmp_path / "bad"
    (bad / "empty").mkdir(parents=True)
    (bad / "text.jpg").write_text("hello")
    pil_image(1).save(bad / "whole.jpg")
    (bad / "cut.jpg").write_bytes((bad / "whole.jpg").read_bytes()[:900])
    for name in ("text.jpg", "cut.jpg", "missing.jpg", "*.gif", "empty"):
        assert name in fails(command, [checkpoint, bad / name, *TINY, *heat_map], capsys)
    both = fails(command, [checkpoint, bad / "cut.jpg", bad / "text.jpg", *TINY, *heat_map], capsys)
    assert "cut.jpg" in both
    assert ("none of the 2 images can be read" in both) == bool(heat_map)
    assert "missing.pth" in fails(command, [tmp_path / "missing.pth", folder, *TINY, *heat_map], capsys)
    torch.save({"model": {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k}}, bad / "d.pth")
    assert "--method: none" in fails(command, [bad / "d.pth", folder, *TINY, *heat_map], capsys)


@pytest.mark.parametrize("heat_map", [[], ["--heat-map"]])
def test_an_input_is_never_overwritten(heat_map, checkpoint, folder, capsys):
    os.symlink(folder / "p2.png", "link.png")
    os.link(checkpoint, "model.png")
    Path("classes.png").write_text("[]")
    before = (folder / "p2.png").read_bytes()
    for out in (folder / "p2.png", "link.png", "model.png", "classes.png"):
        argv: list[Any] = [checkpoint, folder, *TINY, *heat_map, "--classes", "classes.png", "-o", out]
        assert "input itself" in fails(command, argv, capsys)
    assert (folder / "p2.png").read_bytes() == before


def test_a_full_disk_leaves_nothing_behind(checkpoint, folder, capsys, monkeypatch):
    def full(image: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert re.search(r"--out: \S*p0\.kept\.png: No space left", fails(command, [checkpoint, folder, *TINY], capsys))


@pytest.mark.slow
def test_help_loads_no_torch_and_a_real_run_is_silent_on_stderr(checkpoint, folder):
    report = "print(set(sys.modules) & {'torch', 'PIL'})"
    code = f"import sys, dvit_infer.cli.viz as m\ntry: m.main(['-h'])\nexcept SystemExit: {report}"
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "set()"
    done = run("-m", "dvit_infer.cli.viz", str(checkpoint), str(folder), *TINY)
    assert (done.returncode, done.stderr) == (0, "")
