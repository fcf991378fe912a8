"""dvit-predict: its answers are the engine's, and it streams."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ENV, SIZE, TINY, fails, lines, run
from drawn import SMALL, draw_all, write_cut, write_text

import dvit_infer as dvit
from dvit_infer.cli import predict as command
from dvit_infer.evaluate.predictions import model_id, predict
from dvit_infer.images.decode import open_image
from dvit_infer.images.preprocess import Preprocess

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]
CROP = Preprocess((64, 64))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return dvit.convert(checkpoint, device="cpu", **SIZE)


def test_answers_are_the_engines(engine, checkpoint, capsys):
    paths = [*draw_all(Path("d"), 3), *draw_all(Path("d/e"), 2, 3)]
    assert command.main([str(checkpoint), "d", *OPTIONS, "--kept", "--batch", "2"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    found = lines(out.out)
    assert [line["image"] for line in found] == paths
    images = torch.stack([torch.from_numpy(CROP(open_image(path))) for path in paths])
    logits, kept = engine(images, return_kept=True)
    best = logits.softmax(dim=1).topk(5)
    assert len({line["model"] for line in found}) == 1
    assert found[0]["model"] == model_id(engine, checkpoint, CROP)
    for row, line in enumerate(found):
        assert list(line) == ["image", "model", "top5", "kept"]
        assert [answer["class"] for answer in line["top5"]] == best.indices[row].tolist()
        shares = [answer["probability"] for answer in line["top5"]]
        assert shares == pytest.approx(best.values[row].tolist(), abs=1e-5)
        assert line["kept"] == [stage[row].tolist() for stage in kept]


def test_labels(checkpoint, capsys):
    draw_all(Path("d"), 2)
    Path("map.json").write_text(json.dumps({str(index): [f"n{index}", f"thing {index}"] for index in range(9)}))
    assert command.main([str(checkpoint), "d/001.jpg", "d/*.png", *OPTIONS, "--classes", "map.json"]) == 0
    found = lines(capsys.readouterr().out)
    assert [line["image"] for line in found] == ["d/001.jpg", "d/000.png"]
    for answer in itertools.chain(*(line["top5"] for line in found)):
        assert answer["label"] == (f"thing {answer['class']}" if answer["class"] < 9 else None)


def test_a_dense_model_keeps_no_list(checkpoint, capsys):
    draw_all(Path("d"), 1)
    assert command.main([str(checkpoint), "d", *OPTIONS, "--method", "none", "--kept"]) == 0
    assert lines(capsys.readouterr().out)[0]["kept"] == []


def test_unreadable_images_have_lines_too(checkpoint, capsys):
    draw_all(Path("d"), 3)
    write_text(Path("d/001.text.jpg"))
    write_cut(Path("d/z.jpg"))
    assert command.main([str(checkpoint), "d", *OPTIONS]) == 1
    out = capsys.readouterr()
    found = lines(out.out)
    assert [line["image"] for line in found if "error" in line] == ["d/001.text.jpg", "d/z.jpg"]
    assert len(found) == 5
    assert out.err.count("\n") == 1
    assert out.err.startswith("error: 2 of 5 images cannot be read, more than 1%; the first is d/001.text.jpg: ")
    assert command.main([str(checkpoint), "d/z.jpg", "d/001.text.jpg", *OPTIONS]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: d/z.jpg: ")
    assert err.count("\n") == 1


def test_names_that_are_not_utf8_survive(checkpoint, capsys):
    (path,) = draw_all(Path("d"), 1)
    odd = os.path.join("d", os.fsdecode(b"\xff\xe4 \x1b\n.png"))
    os.rename(path, odd)
    assert command.main([str(checkpoint), "d", *OPTIONS, "-o", "r.jsonl"]) == 0
    content = Path("r.jsonl").read_bytes()
    assert content.isascii()
    assert content.count(b"\n") == 1
    assert json.loads(content)["image"] == odd
    assert command.main([str(checkpoint), odd, *OPTIONS, "-o", "r.jsonl"]) == 0
    assert Path("r.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch", "0"], "--batch"),
        (["--workers", "-1"], "--workers"),
        (["--crop-pct", "2"], "--crop-pct"),
        (["--classes", "d"], "--classes"),
        (["-o", "d"], "--out"),
        (["-o", "nowhere/r.jsonl"], "--out"),
        (["-o", "/dev/full"], "--out"),
        (["none.jpg"], "none.jpg"),
        (["empty"], "empty"),
        (["*.gif"], "*.gif"),
        (["--top", "3"], "--top"),
    ],
)
def test_bad_options(argv, named, checkpoint, capsys):
    draw_all(Path("d"), 1)
    os.mkdir("empty")
    assert named in fails(command, [checkpoint, "d", *argv, *OPTIONS] if argv[0] != "--workers" else
                          [checkpoint, "d", *OPTIONS, *argv], capsys)  # fmt: skip


def test_a_batch_that_does_not_fit_leaves_no_file(checkpoint, capsys, monkeypatch):
    draw_all(Path("d"), 1)

    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("dvit_infer.engine.Engine.__call__", no_memory)
    argv = [checkpoint, "d", *OPTIONS, "--batch", "5", "-o", "r.jsonl"]
    assert "--batch: 5 images do not fit" in fails(command, argv, capsys)


def test_answers_that_are_not_finite_are_errors(engine, checkpoint):
    (path,) = draw_all(Path("d"), 1)
    spoiled = dvit.convert(checkpoint, device="cpu", backend="torch", **SIZE)
    spoiled.graph.nodes[-1].weights["head.bias"].fill_(float("nan"))
    ((prediction,),) = predict(spoiled, [path], workers=0)
    assert "NaN or Inf" in json.loads(prediction.line("m"))["error"]


def test_an_endless_stream_of_images(engine):
    (path,) = draw_all(Path("d"), 1)
    taken = itertools.count()
    stream = predict(engine, (path for _ in iter(lambda: next(taken), None)), batch=4, workers=1)
    groups = list(itertools.islice(stream, 5))
    assert [len(group) for group in groups] == [4] * 5
    assert next(taken) <= 20 + 8 * 5
    stream.close()


def test_the_digest_follows_what_answers_depend_on(engine, checkpoint):
    first = model_id(engine, checkpoint, CROP)
    assert first.startswith(f"{engine.config.arch}@")
    engine.save("saved.safetensors")
    assert model_id(dvit.load("saved.safetensors", device="cpu"), "saved.safetensors", CROP) == first
    other = torch.load(checkpoint, weights_only=False)
    other["model"]["head.bias"][3] += 1e-3
    torch.save(other, "other.pth")
    others = {
        model_id(dvit.convert("other.pth", device="cpu", **SIZE), "other.pth", CROP),
        model_id(dvit.convert(checkpoint, device="cpu", keep_rate=0.6, **SIZE), checkpoint, CROP),
        model_id(dvit.convert(checkpoint, device="cpu", dtype="bfloat16", **SIZE), checkpoint, CROP),
        model_id(engine, checkpoint, Preprocess((64, 64), 0.9)),
        model_id(engine, checkpoint, Preprocess((64, 64), 0.875, "center_floor")),
        model_id(engine, checkpoint, Preprocess((64, 64), 0.875, "squash")),
        model_id(engine, checkpoint, Preprocess((64, 64), 1.0, "squash")),
        model_id(engine, checkpoint, Preprocess((64, 64), 0.875, "center", "bilinear")),
        first,
    }
    assert len(others) == 9


@pytest.mark.slow
def test_as_a_program(checkpoint):
    draw_all(Path("d"), 9)
    done = run("-m", "dvit_infer.cli.predict", str(checkpoint), "d", *TINY, "--image-size", "64", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines(done.stdout)) == 9
    closed = f"{sys.executable} -m dvit_infer.cli.predict {checkpoint} d {' '.join(OPTIONS)} --batch 1 | head -1"
    done = subprocess.run(closed, shell=True, capture_output=True, text=True, env=ENV, check=False)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize("module", ["dvit_infer.cli.predict", "dvit_infer.cli.eval", "dvit_infer.cli.embed"])
def test_help_loads_no_torch(module):
    code = f"import sys, {module} as m\ntry: m.main(['-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = run("-c", code)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "False", "")


def test_a_batch_that_is_larger_than_memory(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("dvit_infer.utils.memory.free_memory", lambda device: 1 << 20)
    draw_all(Path("photos"), 1)
    line = fails(command, [checkpoint, "photos", *OPTIONS, "--batch", "100000"], capsys)
    assert "--batch: 100000 images do not fit in memory" in line
