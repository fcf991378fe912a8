"""dvit-embed as a command: what it says, exit statuses, killed runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENV, ROOT, TINY, fails, lines
from drawn import SMALL, draw_all, write_text

from dvit_infer.cli import embed, eval
from dvit_infer.evaluate.embedding_folder import FEATURES, IMAGES

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]
DOCS = (ROOT / "docs" / "embed.md").read_text()


def test_it_says_what_it_wrote_and_what_it_could_not_read(checkpoint, capsys):
    draw_all(Path("photos"), 5)
    argv = [str(checkpoint), "photos", *OPTIONS, "-o", "emb", "--normalize"]
    assert embed.main(argv) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert "5 images, 64 features each (own, normalized), float32, in emb\n" in out.out
    assert re.search(r"images/s: decoding .* by no workers, model .*\n$", out.out)
    assert embed.main(argv) == 0
    assert capsys.readouterr().out.endswith("in emb\n5 were there already\n")
    write_text(Path("photos/x.jpg"))
    assert embed.main(argv) == 1
    out = capsys.readouterr()
    assert out.err.startswith("error: 1 of 6 images cannot be read, more than 1%; the first is photos/x.jpg: ")
    assert "1 of them cannot be read: their rows are NaN\n" in out.out
    assert [line["image"] for line in lines(Path("emb", IMAGES).read_text())][-1] == "photos/x.jpg"


def test_bad_usage(checkpoint, capsys):
    draw_all(Path("photos"), 1)
    write_text(Path("text/x.jpg"))
    Path("full").mkdir()
    Path("full/notes").touch()
    Path("a.onnx").write_bytes(b"model")
    for argv, why in (
        ([checkpoint, "photos"], "-o/--out"),
        ([checkpoint, "photos", "-o", "full"], "error: --out: "),
        ([checkpoint, "photos", "-o", checkpoint], "--out: "),
        ([checkpoint, "photos", "-o", "none/emb"], "--out: none/emb: there is no folder"),
        ([checkpoint, "none", "-o", "emb"], "none: there is no such"),
        ([checkpoint, "photos", "-o", "emb", "--pool", "map"], "--pool: "),
        ([checkpoint, "photos", "-o", "emb", "--store", "int8"], "--store: "),
        ([checkpoint, "photos", "-o", "emb", "--batch", "0"], "--batch: "),
        ([checkpoint, "photos", "-o", "emb", "--classes", "x"], "--classes"),
        (["none.pth", "photos", "-o", "emb"], "none.pth"),
    ):
        assert why in fails(embed, [*argv, *OPTIONS], capsys)
    assert embed.main([str(checkpoint), "text", "-o", "emb", *OPTIONS]) == 2
    assert capsys.readouterr().err.startswith("error: text/x.jpg: ")


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(checkpoint):
    for at, path in enumerate(draw_all(Path("photos"), 30)):
        for number in range(5):
            os.link(path, f"photos/{number}-{at}{Path(path).suffix}")
    write_text(Path("photos/3-1.text.jpg"))
    at_once = "from dvit_infer.evaluate import embedding_folder; embedding_folder.COMMIT_S = 0\n"  # else each second
    argv = [sys.executable, "-c", f"{at_once}from dvit_infer.cli import embed; raise SystemExit(embed.main())"]
    argv += [str(checkpoint), "photos", *TINY, "--batch", "3", "--workers", "1", "-o"]
    env, done = ENV | {"OMP_NUM_THREADS": "1"}, 0
    for _ in range(2):
        process = subprocess.Popen([*argv, "emb"], env=env, stderr=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and count(Path("emb", IMAGES)) <= done:
            time.sleep(0.003)  # until a batch is there: the kill has to come amid a run, wherever that is
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        done = count(Path("emb", IMAGES))
        assert 0 < done < 181
    assert not json.loads(Path("emb/index.json").read_text())["complete"]
    for out in ("emb", "whole"):
        ended = subprocess.run([*argv, out], env=env, check=False, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(os.listdir("emb")) == sorted(os.listdir("whole"))
    assert all(path.read_bytes() == Path("emb", path.name).read_bytes() for path in Path("whole").iterdir())


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_docs_name_options_that_exist():
    known = {option for one in (embed, eval) for action in one._parser()._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", DOCS)) <= known
    assert FEATURES in DOCS
    assert IMAGES in DOCS
