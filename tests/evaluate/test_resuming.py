"""A results file of dvit-predict: it goes on where it was stopped, and holds whole lines of one model alone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENV, TINY, fails, lines
from drawn import SMALL, draw_all, write_text

import dvit_infer as dvit
from dvit_infer.cli import predict as command
from dvit_infer.evaluate.results_file import results
from dvit_infer.images.decode import open_image

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]


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
    """Equal but for the last digits: an image's batch may be another."""
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
    monkeypatch.setattr("dvit_infer.images.decoded.open_image", lambda path: opened.append(path) or open_image(path))
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
        assert f"r.jsonl: line {2 if good else 1}: is not a line of dvit-predict" in line
        assert Path("r.jsonl").read_bytes() == good + content


def test_results_never_replace_the_model(checkpoint, capsys):
    draw_all(Path("d"), 1)
    shutil.copy(checkpoint, "m.pth")
    assert "input itself" in fails(command, ["m.pth", "d", *OPTIONS, "-o", "m.pth"], capsys)
    assert Path("m.pth").read_bytes() == checkpoint.read_bytes()
    image = Path("d/000.png").read_bytes()
    assert "line 1: is not a line" in fails(command, ["m.pth", "d", *OPTIONS, "-o", "d/000.png"], capsys)
    assert Path("d/000.png").read_bytes() == image


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


@pytest.mark.slow
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


def test_two_runs_do_not_write_to_one_file(checkpoint, capsys):
    fcntl = pytest.importorskip("fcntl")
    draw_all(Path("photos"), 1)
    with open("p.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = fails(command, [checkpoint, "photos", *OPTIONS, "-o", "p.jsonl"], capsys)
    assert "another run writes to it" in line
