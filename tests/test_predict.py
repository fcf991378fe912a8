"""dvit-predict: its answers are the engine's; it streams; it goes on where it was stopped."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ENV, TINY, fails, run
from drawn import SMALL, draw_all, write_cut, write_text
from test_eval import SIZE

import dvit_infer as dvit
from dvit_infer.cli import predict as command
from dvit_infer.pictures.decode import Preprocess, open_picture
from dvit_infer.predictions import model_id, predict
from dvit_infer.resuming import results

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]
CROP = Preprocess((64, 64))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return dvit.convert(checkpoint, device="cpu", **SIZE)


def lines(text: str) -> list[dict]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_the_engines(engine, checkpoint, capsys):
    paths = [*draw_all(Path("d"), 3), *draw_all(Path("d/e"), 2, 3)]
    assert command.main([str(checkpoint), "d", *OPTIONS, "--kept", "--batch", "2"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    found = lines(out.out)
    assert [line["image"] for line in found] == paths
    images = torch.stack([torch.from_numpy(CROP(open_picture(path))) for path in paths])
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


def test_unreadable_pictures_have_lines_too(checkpoint, capsys):
    draw_all(Path("d"), 3)
    write_text(Path("d/001.text.jpg"))
    write_cut(Path("d/z.jpg"))
    assert command.main([str(checkpoint), "d", *OPTIONS]) == 1
    out = capsys.readouterr()
    found = lines(out.out)
    assert [line["image"] for line in found if "error" in line] == ["d/001.text.jpg", "d/z.jpg"]
    assert len(found) == 5
    assert out.err.count("\n") == 1
    assert out.err.startswith("error: 2 of 5 pictures cannot be read, more than 1%; the first is d/001.text.jpg: ")
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


def test_an_interrupted_run_goes_on_where_it_stopped(checkpoint, capsys):
    draw_all(Path("d"), 7)
    write_text(Path("d/003.text.jpg"))
    argv = [str(checkpoint), "d", *OPTIONS, "--kept", "--batch", "3"]
    assert command.main([*argv, "-o", "whole.jsonl"]) == 1
    whole = Path("whole.jsonl").read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 8
    first_error = capsys.readouterr().err
    for cut in (0, 5, ends[0] - 1, ends[0], ends[2] + 20, ends[4] + 1, ends[6] + 400, ends[7]):
        Path("r.jsonl").write_bytes(whole[:cut])
        assert command.main([*argv, "-o", "r.jsonl"]) == 1
        assert capsys.readouterr().err.split(";")[0] == first_error.split(";")[0]
        kept_part = max([end for end in ends if end <= cut], default=0)
        again = Path("r.jsonl").read_bytes()
        assert again[:kept_part] == whole[:kept_part]
        same(lines(again.decode()), lines(whole.decode()))


def same(ours: list[dict], theirs: list[dict]) -> None:
    """Equal but for the last digits: a picture's batch may be another."""
    for a, b in zip(ours, theirs, strict=True):
        if "top5" in a:
            shares = [[answer.pop("probability") for answer in line["top5"]] for line in (a, b)]
            assert shares[0] == pytest.approx(shares[1], abs=1e-5)
        assert a == b


def test_what_is_done_is_not_done_again(checkpoint, monkeypatch):
    paths = draw_all(Path("d"), 4)
    argv = [str(checkpoint), *OPTIONS, "-o", "r.jsonl"]
    assert command.main([*argv, *paths[:3], paths[0]]) == 0
    assert [line["image"] for line in lines(Path("r.jsonl").read_text())] == paths[:3]
    opened = []
    monkeypatch.setattr(
        "dvit_infer.pictures.stream.open_picture", lambda path: opened.append(path) or open_picture(path)
    )
    assert command.main([*argv, "d"]) == 0
    assert opened == paths[3:]
    assert [line["image"] for line in lines(Path("r.jsonl").read_text())] == paths
    assert command.main([*argv, "d"]) == 0
    assert opened == paths[3:]


def test_results_of_other_settings_are_left_alone(checkpoint, capsys):
    draw_all(Path("d"), 2)
    Path("map.json").write_text('["a", "b"]')
    argv = [checkpoint, "d", *OPTIONS, "-o", "r.jsonl"]
    assert command.main([str(a) for a in argv]) == 0
    content = Path("r.jsonl").read_bytes()
    for more in (
        *(["--keep-rate", "0.5"], ["--crop-pct", "0.9"], ["--method", "none"], ["--dtype", "bfloat16"]),
        *(["--image-size", "96"], ["--kept"], ["--classes", "map.json"]),
    ):
        assert "--out: " in (line := fails(command, [*argv, *more], capsys))
        assert "r.jsonl: line 1" in line
        assert Path("r.jsonl").read_bytes() == content
    assert command.main([*map(str, argv[:-1]), "k.jsonl", "--kept"]) == 0
    assert "k.jsonl: line 1: has kept" in fails(command, [*argv[:-1], "k.jsonl"], capsys)


@pytest.mark.parametrize(
    "content",
    [
        b"my notes\n",
        b"my notes, without an end",
        b"{}\n",
        b'{"image": "a.jpg", "label": 3}\n',
        b'{"image": 3, "model": "m", "error": "x"}\n',
        b'{"image": "a.jpg", "model": "m", "top5": 3}\n',
        b"\n",
        b"\0" * 90,
        b"[" * 100_000 + b"\n",
        b"\xff\xd8\xff\xe0\n",
    ],
)
def test_files_of_something_else_are_left_alone(content, checkpoint, capsys):
    draw_all(Path("d"), 1)
    for good in (b"", None):
        if good is None:  # the line is the second one
            assert command.main([str(checkpoint), "d", *OPTIONS, "-o", "good.jsonl"]) == 0
            good = Path("good.jsonl").read_bytes()
        Path("r.jsonl").write_bytes(good + content)
        line = fails(command, [checkpoint, "d", *OPTIONS, "-o", "r.jsonl"], capsys)
        assert f"r.jsonl: line {2 if good else 1}: is no line of dvit-predict" in line
        assert Path("r.jsonl").read_bytes() == good + content


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


def test_results_never_replace_the_model(checkpoint, capsys):
    draw_all(Path("d"), 1)
    shutil.copy(checkpoint, "m.pth")
    assert "input itself" in fails(command, ["m.pth", "d", *OPTIONS, "-o", "m.pth"], capsys)
    assert Path("m.pth").read_bytes() == checkpoint.read_bytes()
    picture = Path("d/000.png").read_bytes()
    assert "line 1: is no line" in fails(command, ["m.pth", "d", *OPTIONS, "-o", "d/000.png"], capsys)
    assert Path("d/000.png").read_bytes() == picture


def test_a_batch_that_does_not_fit_leaves_no_file(checkpoint, capsys, monkeypatch):
    draw_all(Path("d"), 1)

    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("dvit_infer.engine.Engine.__call__", no_memory)
    argv = [checkpoint, "d", *OPTIONS, "--batch", "5", "-o", "r.jsonl"]
    assert "--batch: 5 pictures do not fit" in fails(command, argv, capsys)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    line = '{"image": "a", "model": "m", "top5": []}'
    with results(path, "m", kept=False, labelled=False) as file:
        file.append([line])

        class Full:
            def write(self, content: bytes, of=file._file) -> int:
                if len(content) < 60:
                    raise OSError(28, "No space left on device")
                return of.write(content[:50])  # the disk takes some of it, and then no more

            truncate = file._file.truncate

        inner, file._file = file._file, Full()
        with pytest.raises(dvit.InputError, match=r"out: .*r\.jsonl: No space left"):
            file.append([line.replace('"a"', '"b"'), line.replace('"a"', '"c"')])
        file._file = inner
    assert path.read_text() == line + "\n"


def test_answers_that_are_not_finite_are_errors(engine, checkpoint):
    (path,) = draw_all(Path("d"), 1)
    spoiled = dvit.convert(checkpoint, device="cpu", **SIZE)
    spoiled.graph.nodes[-1].weights["head.bias"].fill_(float("nan"))
    ((prediction,),) = predict(spoiled, [path], workers=0)
    assert "NaN or Inf" in json.loads(prediction.line("m"))["error"]


def test_an_endless_stream_of_pictures(engine):
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
        first,
    }
    assert len(others) == 5


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_it_and_its_workers_leaves_whole_lines(stop, checkpoint):
    (path,) = draw_all(Path("d"), 1)
    for number in range(20_000):
        os.link(path, f"d/copy{number}.png")
    argv = [str(checkpoint), "d", *TINY, "--image-size", "64", "--workers", "2", "-o", "r.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dvit_infer.cli.predict", *argv],
        env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not (Path("r.jsonl").exists() and Path("r.jsonl").stat().st_size):
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    for worker in workers:  # what the terminal sends to all never reaches them, not even while they start
        (blocked,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{worker}/status").read_text())
        assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)  # a terminal's reaches all
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert 0 < len(lines(Path("r.jsonl").read_text())) < 20_001
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_as_a_program(checkpoint):
    draw_all(Path("d"), 9)
    done = run("-m", "dvit_infer.cli.predict", str(checkpoint), "d", *TINY, "--image-size", "64", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines(done.stdout)) == 9
    closed = f"{sys.executable} -m dvit_infer.cli.predict {checkpoint} d {' '.join(OPTIONS)} --batch 1 | head -1"
    done = subprocess.run(closed, shell=True, capture_output=True, text=True, env=ENV, check=False)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize("module", ["dvit_infer.cli.predict", "dvit_infer.cli.eval"])
def test_help_loads_no_torch(module):
    code = f"import sys, {module} as m\ntry: m.main(['-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = run("-c", code)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "False", "")


def test_two_runs_do_not_write_to_one_file(checkpoint, capsys):
    fcntl = pytest.importorskip("fcntl")
    draw_all(Path("photos"), 1)
    with open("p.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = fails(command, [checkpoint, "photos", *OPTIONS, "-o", "p.jsonl"], capsys)
    assert "another run writes to it" in line


def test_a_batch_that_is_larger_than_memory(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("dvit_infer.pictures.stream.free_memory", lambda device: 1 << 20)
    draw_all(Path("photos"), 1)
    line = fails(command, [checkpoint, "photos", *OPTIONS, "--batch", "100000"], capsys)
    assert "--batch: 100000 pictures do not fit in memory" in line
