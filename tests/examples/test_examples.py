"""The scripts and the notebook of examples/, run as a user runs them."""

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import ENV, ROOT

from dvit_infer.utils.packages import import_beside_torchvision

sys.path.append(str(ROOT / "bench" / "proof"))
from cluttered_digits import draw
from pictures import write

EXAMPLES = ROOT / "examples"
DIGITS = str(ROOT / "bench" / "proof" / "digits-0.7.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of digits, each in a folder named after its digit."""
    folder = tmp_path_factory.mktemp("images") / "digits"
    write(folder, *draw(12, "test", 28))
    return folder


@pytest.fixture
def example(monkeypatch, capsys, tmp_path):
    """Run a script with arguments, in an empty folder; the lines that it prints."""

    def run(name: str, *argv: str | Path) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.slow
def test_classify_a_folder(example, folder, tmp_path):
    (tmp_path / "digits").symlink_to(folder)
    (tmp_path / "digits.png").write_text("no image")
    *lines, broken, counts = example("classify_folder.py", DIGITS, tmp_path)
    assert len(lines) == 12
    assert all(re.search(r"/(\d)/\d+\.png: class \1, \d+\.\d%$", line) for line in lines)
    assert broken.startswith(f"{tmp_path}/digits.png: is not a readable image")
    assert sum(map(int, re.findall(r"(\d+) x class", counts))) == 12


@pytest.mark.slow
def test_search_in_a_folder(example, folder, tmp_path):
    query = sorted(folder.rglob("*.png"))[5]
    first = example("search.py", DIGITS, folder, tmp_path / "embedding", query)
    cosines = [float(line.split()[0]) for line in first]
    assert first[0] == f"1.000 {query}"
    assert len(first) == 5
    assert cosines == sorted(cosines, reverse=True)
    assert example("search.py", DIGITS, folder, tmp_path / "embedding", query) == first


@pytest.mark.slow
@pytest.mark.parametrize("library", ["dvit_infer", "timm"])
def test_prune_in_a_block(example, library, monkeypatch):
    """In timm's blocks only where timm is installed, which is no dependency: it needs a torchvision for this torch."""
    if library == "timm":
        if find_spec("timm") is None:
            pytest.skip("timm is not installed")
        import_beside_torchvision("timm")
    else:
        monkeypatch.setitem(sys.modules, "timm", None)
    (line,) = example("prune_in_block.py")
    assert line.startswith(f"{library}.models.")
    assert "predictor 0.7: 44,31,21 of 64" in line
    assert float(line.split()[-1]) < 1e-4


@pytest.mark.slow
def test_ask_a_server(example, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENV["PYTHONPATH"])
    images = sorted(folder.rglob("*.png"))[:3]
    lines = example("ask_server.py", DIGITS, *images)
    expected = [f"{image}: {{'class': {image.parent.name}, 'probability': " for image in images]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


@pytest.mark.slow
def test_the_notebook_prints_what_is_in_it(monkeypatch):
    """Its output is committed, so that it can be read; after a change, `jupyter execute --inplace` writes it anew."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", ENV["PYTHONPATH"])
    notebook = nbformat.read(EXAMPLES / "kept_tokens.ipynb", 4)
    shown = _texts(notebook)
    place = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=place).execute()
    assert _texts(notebook) == shown
    assert len(shown) == 4


def _texts(notebook) -> list[str]:
    """What each cell prints; that none fails or warns."""
    texts = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
        texts += ["".join(output.get("text", "") for output in outputs)]
    return [text for text in texts if text]
