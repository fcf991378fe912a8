"""On a cluster of two nodes: answers are the engine's, in order, once, whatever is killed; and nothing stays behind."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clusters import QUIET, below, of_session, two_nodes
from commands import ENV, ROOT, SIZE, TINY, lines
from drawn import draw, draw_all, write_cut, write_text

import dvit_infer as dvit
from dvit_infer.evaluate.embedding_folder import FEATURES, IMAGES, INDEX
from dvit_infer.evaluate.predictions import predict
from dvit_infer.images.find import find_images

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.usefixtures("_empty_folder"),
]
OPTIONS = [*TINY, "--image-size", "64", "--backend", "torch"]
ENGINE = {**SIZE, "device": "cpu", "backend": "torch"}
CONTENTS = 8


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch, two_nodes(patch) as made:
        yield made


@pytest.fixture(scope="module")
def engine(checkpoint):
    return dvit.convert(checkpoint, **ENGINE)


def write_many(folder: Path, count: int, damaged: frozenset[int] = frozenset()) -> None:
    """Write images of a few contents, number i of content i % CONTENTS; those that are `damaged` are text."""
    for content in range(CONTENTS):
        draw(content).save(f"{content}.png")
    write_text(Path("damaged"))
    for number in range(count):
        path = folder / f"{number // 1000}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link("damaged" if number in damaged else f"{number % CONTENTS}.png", path)


def started(module: str, *argv: str, before: str = "") -> subprocess.Popen[str]:
    """A command in a session of its own, as in a terminal; it never says that a start takes long."""
    patient = "from dvit_infer.cli import on_ray; on_ray._LONG_S = float('inf')"
    code = f"{patient}\n{before}\nfrom dvit_infer.cli import {module}\nraise SystemExit({module}.main())"
    env = {**ENV, **QUIET, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *argv], text=True, env=env, start_new_session=True, **pipes)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Ask another process's state until it is so; files and /proc wake nobody up. Ten minutes are a failure."""
    for _ in range(12_000):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("it never was")


def wait_for_end(session: int) -> None:
    wait_until(lambda: not of_session(session))


def wait_for_lines(path: str, count: int, process: subprocess.Popen[str]) -> None:
    def written() -> bool:
        return os.path.exists(path) and Path(path).read_bytes().count(b"\n") >= count

    wait_until(lambda: process.poll() is not None or written())
    assert process.poll() is None, process.communicate()


def check_top5(found: list[list[dict]], expected: list[tuple[tuple[int, float], ...]]) -> None:
    assert [[one["class"] for one in top] for top in found] == [[index for index, _ in top] for top in expected]
    shares = [[one["probability"] for one in top] for top in found]
    np.testing.assert_allclose(shares, [[share for _, share in top] for top in expected], atol=1e-5)


def test_ten_thousand_images_once_and_in_order_though_an_engine_and_the_driver_are_killed(cluster, engine, checkpoint):
    damaged = frozenset((1, 5000, 9999))
    write_many(Path("photos"), 10_000, damaged)
    argv = ["predict", str(checkpoint), "photos", *OPTIONS, "-o", "out.jsonl", f"--ray={cluster.address}"]
    first = started(*argv)
    wait_for_lines("out.jsonl", 500, first)
    engines = below(os.getpid(), "ray::Worker")
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    wait_for_lines("out.jsonl", 3000, first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert Path("out.jsonl").read_bytes().count(b"\n") < 10_000
    second = started(*argv)
    out, err = second.communicate()
    assert (second.returncode, out, err) == (0, "", "")
    found = lines(Path("out.jsonl").read_text())
    assert [line["image"] for line in found] == list(find_images(["photos"]))
    assert {number for number, line in enumerate(found) if "error" in line} == damaged
    (answers,) = predict(engine, [f"{content}.png" for content in range(CONTENTS)], workers=0)
    readable = [number for number in range(10_000) if number not in damaged]
    check_top5([found[number]["top5"] for number in readable], [answers[n % CONTENTS].top for n in readable])


def test_an_interrupt_leaves_nothing_running_and_the_same_command_goes_on(engine, checkpoint):
    """Ray is started by the command, and stopped."""
    write_many(Path("photos"), 3000, frozenset((70,)))
    argv = ["embed", str(checkpoint), "photos", *OPTIONS, "-o", "emb", "--ray"]
    at_once = "from dvit_infer.evaluate import embedding_folder; embedding_folder.COMMIT_S = 0"  # else each second
    process = started(*argv, before=at_once)
    wait_for_lines(f"emb/{IMAGES}", 16, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert (process.communicate()[1], process.returncode) == ("error: interrupted\n", 130)
    wait_for_end(process.pid)
    done = Path("emb", IMAGES).read_bytes().count(b"\n")
    assert 16 <= done < 3000
    process = started(*argv)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert f"{done:,} were there already\n" in out
    dvit.embed(engine, "photos", "alone", workers=0)
    for name in (IMAGES, INDEX):
        assert Path("emb", name).read_bytes() == Path("alone", name).read_bytes()
    np.testing.assert_allclose(np.load(f"emb/{FEATURES}"), np.load(f"alone/{FEATURES}"), atol=1e-5)
    wait_for_end(process.pid)


def test_datasets(cluster, engine, checkpoint):
    ray = pytest.importorskip("ray")
    spec = importlib.util.spec_from_file_location("ray_classify", ROOT / "examples" / "ray_classify.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = Path("m.safetensors")
    engine.save(model)
    paths = draw_all(Path("photos"), 6)
    write_cut(Path("photos/003.cut.jpg"))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = {os.path.relpath(row["image"]): row for row in example.classified(str(model), "photos").iter_rows()}
        # The order of rows is Ray's, unless it is told to keep theirs.
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        one = [{"image": np.full((64, 64, 3), 40 * value, np.uint8)} for value in range(3)]
        images = ray.data.from_items([*one, {"image": np.zeros((30, 40, 3), np.uint8)}])
        of = {"fn_constructor_args": (str(model.absolute()),), "concurrency": 1, "num_cpus": 1}
        embedded = images.map_batches(dvit.ray.Embed, **of).take_all()
    finally:
        ray.shutdown()
    assert sorted(rows) == sorted([*paths, "photos/003.cut.jpg"])
    cut = rows.pop("photos/003.cut.jpg")
    assert cut["top5"] is None
    assert "truncated" in cut["error"]
    assert {row["error"] for row in rows.values()} == {None}
    (answers,) = predict(engine, paths, workers=0)
    check_top5([rows[path]["top5"] for path in paths], [answer.top for answer in answers])
    expected = engine.features(np_images([row["image"] for row in one]))
    np.testing.assert_allclose([row["features"] for row in embedded[:3]], expected, atol=1e-5)
    assert np.isnan(embedded[3]["features"]).all()
    assert embedded[3]["error"].startswith("is 30x40; the model takes 64x64, and dvit.ray.Decode prepares")


def np_images(images):
    import torch

    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def test_a_node_without_the_package_is_named(cluster, checkpoint):
    """The last test of the cluster, as the node stays."""
    hidden = Path("site/sitecustomize.py")
    hidden.parent.mkdir()
    hidden.write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'dvit_infer':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(hidden.parent.absolute())})
    draw_all(Path("photos"), 2)
    process = started("predict", str(checkpoint), "photos", *OPTIONS, f"--ray={cluster.address}")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: --ray: node ")
    assert err.endswith(": has no Python package dvit_infer; install the same versions on every node\n")
