"""Every snippet of README and the manual runs, a page in a folder of its own, and its output is as shown."""

import os
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from golden_vits import write
from snippets import Page, commands, comparable, difference

from dvit_infer.models.example import example_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
SET_BY_TESTS = ("DVIT_KERNELS", "TRITON_INTERPRET")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page finds in its folder: checkpoints with random weights under the names of official ones, but for
    the two that are trained, `dense.pth` and `digits-0.7.pth`; images of ten classes; a file that is no image."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(example_checkpoint("dynamicvit-deit-t"), folder / "dynamicvit_deit-t.pth")
    torch.save(example_checkpoint("deit-t"), folder / "deit_tiny.pth")
    write("hf-vit-tiny", folder / "vit-tiny")  # folders of Hugging Face
    write("hf-dinov2-swiglu-tiny", folder / "dinov2-tiny")
    for name in ("dense.pth", "digits-0.7.pth"):
        shutil.copy(ROOT / "bench" / "proof" / name, folder)
    _draw(folder / "images", 100)
    shutil.copy(ROOT / "docs" / "digit.png", folder)
    (folder / "notes.txt").write_text("this is no image\n")
    return folder


def _draw(folder: Path, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "proof"))
        from cluttered_digits import test_set
        from pictures import write as write_images

        images, labels = test_set()
        write_images(folder, images[:count], labels[:count])


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of this checkout, whatever is installed."""
    folder = tmp_path_factory.mktemp("bin")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, target in project["scripts"].items():
        module, function = target.split(":")
        (folder / name).write_text(f"#!{sys.executable}\nfrom {module} import {function} as f\nraise SystemExit(f())\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def environment(programs) -> dict[str, str]:
    """A user's environment, in which the commands and the package are this checkout's."""
    ours = {name: value for name, value in os.environ.items() if name not in SET_BY_TESTS}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), ours.get("PATH", os.defpath)])
    return {**ours, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page(page, files, environment, tmp_path, monkeypatch):
    shutil.copytree(files, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    for folder in ("bench", "examples"):  # scripts of the checkout
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    Page(ROOT / page, environment).run()


def run(text: str, folder: Path, environment: dict[str, str]) -> None:
    path = folder / "page.md"
    path.write_text(text)
    Page(path, environment).run()


PASSING = """
```python
x = 2
print("a", x)
print("b\\n...")
```

```text
a 2
b
...
```

```console
$ cd / && y=3
$ echo $y \\
  $((x + 4)) images/s && pwd
71,304.5 8  images/s
/
$ sleep 100 & seq 5
1
...
5
...
$ echo error: so it is >&2; (exit 2)
error: so it is
```

    ```sh
    X=1 pip install 'a[b]' && docker run \\
      -x y; make z
    ```
"""


def test_what_is_shown_is_what_runs(tmp_path, environment):
    run(PASSING, tmp_path, environment)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("```python\nprint(1)\n```\nand\n```text\n1\n```", "does not follow a python block"),
        ("```python\nprint(1)\n```\n```text\n2\n```", "- 2"),
        ("```console\n$ echo a\nb\n```", "echo a"),
        ("```console\n$ echo a\na\nb\n```", "echo a"),
        ("```console\n$ false\n```", "status 1"),
        ("```console\n$ echo error: no\nerror: no\n```", "status 0"),
        ("```console\n$ exit 0\n```", "ended the shell"),
        ("```sh\npip install a | dvit-bench\n```", "dvit-bench"),
        ("```json\n{'a': 1}\n```", "Expecting"),
        ("```\n$ false\n```", "none of these languages"),
    ],
)
def test_what_differs_is_found(block, said, tmp_path, environment):
    with pytest.raises(Exception, match=said):
        run(block, tmp_path, environment)


def test_figures_and_widths_do_not_count():
    here = "┏━━━━┳━━┓\n┃ a  ┃ b ┃\n│ 1,234.5 │ 1.0e-06 │ on intel-xeon-2-threads, torch 2.13.0+cpu\n"
    there = "┏━┳━━━━┓\n┃  a ┃ b┃\n│ 7 │    0 │ on amd-epyc-16-threads, torch 3.0\n"
    assert comparable(here) == comparable(there)
    assert comparable("1 image") != comparable("1 images")
    assert difference("a\n...\nb\n", "a\nb\n") is None
    assert commands("$ a \\\n b\nc\n$ d\n") == [("a \\\n b", "c\n"), ("d", "")]
