"""What the tests of the commands share."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ["--assume", "num_heads=2", "--device", "cpu"]
SIZE = {"assume": {"num_heads": 2}, "image_size": 64}  # what TINY and drawn.SMALL say, for a call
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def fails(command, argv, capsys) -> str:
    """Run a command that has to fail: exit 2, one line on stderr after any warnings, nothing left. Returns the line."""
    before = sorted(os.listdir())
    try:
        status = command.main([str(a) for a in argv])
    except SystemExit as exit_:
        status = exit_.code
    out = capsys.readouterr()
    assert status == 2
    assert re.fullmatch(r"(warning: [^\n]+\n)*error: [^\n]+\n", out.err), out.err
    assert sorted(os.listdir()) == before
    return out.err.splitlines(keepends=True)[-1]


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENV, check=False, **options)


def lines(text: str) -> list[dict]:
    """The JSON objects of whole lines."""
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]
