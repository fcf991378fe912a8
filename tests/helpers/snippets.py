"""The fenced blocks of a page of the manual, run in order; sybil finds them.

* `python` is run in the page's one namespace.
* `text`, right after a python block, is what that printed, where `...` stands for anything.
* `console` has lines `$ command`, run by one bash for the page (a trailing backslash continues), each with what it
  writes to stdout and stderr. Figures and lengths of rules need not agree, a line `...` stands for any lines, and
  without any output shown, none is compared. A command whose shown output ends in a line `error: ...` has to end with
  status 2, any other with 0.
* `json` is read as JSON, one value or one a line.
* `sh` is not run: programs that are not here (`ELSEWHERE`).

Any other language, and none at all, is an error.
"""

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import signal
import subprocess
import threading
from pathlib import Path

from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import FENCE

ELSEWHERE = {"pip", "docker", "git", "make", "trtexec", "nvcc", "cmake", "apt"}
SECONDS = 300  # that a page's commands may take
_DONE = "--- the command has ended:"
_NUMBER = re.compile(r"\d[\d,]*(\.\d+)*(e[+-]?\d+)?")
_MACHINE = re.compile(r"[\w-]*-#-threads")
_RULE = re.compile(r"([─━═ ])\1+")


class Page:
    """Runs the blocks of one page.

    Args:
        path: the page.
        environment: of its commands, which run in the current folder.
    """

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        languages = {
            "python": self._python,
            "text": self._text,
            "console": self._console,
            "json": self._json,
            "sh": self._sh,
        }
        parsers = [CodeBlockParser(language, evaluate) for language, evaluate in languages.items()]
        self._document = Document.parse(str(path), *parsers)
        self._environment = environment
        self._printed: tuple[int, str] = (-1, "")  # where the last python block ended, and what it printed
        self._shell: Shell | None = None
        fences = len(FENCE.findall(self._document.text))
        assert fences == 2 * len(self._document.regions), f"{path}: a block has none of these languages: {[*languages]}"

    def run(self) -> None:
        try:
            for example in self._document.examples():
                example.evaluate()
        finally:
            if self._shell is not None:
                self._shell.close()

    def _python(self, example: Example) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            PythonEvaluator()(example)
        self._printed = example.end, printed.getvalue()

    def _text(self, example: Example) -> str | None:
        end, printed = self._printed
        if end < 0 or self._document.text[end : example.start].strip():
            return "it does not follow a python block"
        return difference(_stripped(example.parsed), _stripped(printed))

    def _console(self, example: Example) -> str | None:
        self._shell = self._shell or Shell(self._environment)
        for command, shown in commands(example.parsed):
            status, output = self._shell.run(command)
            expected = 2 if re.search(r"^error: .*\Z", shown.rstrip(), re.MULTILINE) else 0
            if status != expected:
                return f"$ {command}\nended with status {status}:\n{output}"
            if shown and (found := difference(comparable(shown), comparable(output))):
                return f"$ {command}\n{found}\nas it was written:\n{output}"
        return None

    def _json(self, example: Example) -> None:
        try:
            json.loads(example.parsed)
        except json.JSONDecodeError:
            for line in example.parsed.splitlines():
                json.loads(line)

    def _sh(self, example: Example) -> str | None:
        words = shlex.shlex(example.parsed.replace("\\\n", " "), posix=True, punctuation_chars=";&|\n")
        words.whitespace, words.whitespace_split = " \t", True
        first, here = True, set()
        for word in words:
            if first and not re.fullmatch(r"[;&|\n]+|\w+=.*", word):
                here |= {Path(word).name} - ELSEWHERE
            first = re.fullmatch(r"[;&|\n]+", word) is not None or (first and "=" in word)
        return f"{', '.join(sorted(here))}: a console block would run this" if here else None


class Shell:
    """One bash, in which a page's commands run one after the other; what they leave in the background ends with it."""

    def __init__(self, environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self._bash = subprocess.Popen(
            ["bash"], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment, process_group=0
        )
        self._timer = threading.Timer(SECONDS, self.close)
        self._timer.start()

    def run(self, command: str) -> tuple[int, str]:
        """Return the status of a command, and what was written to stdout and stderr until it ended."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{{ {command}\n}} </dev/null\necho '{_DONE}' $?\n")
        self._bash.stdin.flush()
        output = ""
        for line in self._bash.stdout:
            before, mark, status = line.partition(_DONE)
            output += before
            if mark:
                return int(status), output
        raise AssertionError(f"$ {command}\nended the shell, or took more than {SECONDS} s:\n{output}")

    def close(self) -> None:
        self._timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.wait()


def commands(block: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with the output that is shown."""
    assert block.startswith("$ "), f"a console block begins with a command: {block!r}"
    found: list[tuple[str, str]] = []
    continued = False
    for line in block.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), ""))
        elif continued:
            found[-1] = (found[-1][0] + line, "")
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
        continued = line.endswith("\\\n") and not found[-1][1]
    return [(command.rstrip("\n"), shown) for command, shown in found]


def comparable(output: str) -> str:
    """Return the output of a command without what depends on the machine: numbers, its name, widths of columns."""
    output = _MACHINE.sub("MACHINE", _NUMBER.sub("#", output))
    output = re.sub(r"#\+\w+", "#", output)  # torch 2.13.0+cpu
    return _stripped(re.sub(r" ?([│┃┏┳┓┡╇┩└┴┘├┼┤]) ?", r"\1", _RULE.sub(r"\1", output)))


def difference(shown: str, found: str) -> str | None:
    """Return how what was found differs from what is shown, where `...` stands for anything; None: it does not."""
    want = re.sub(r"^\.\.\.\n", "...", shown, flags=re.MULTILINE)
    checker = doctest.OutputChecker()
    if checker.check_output(want, found, doctest.ELLIPSIS):
        return None
    return checker.output_difference(doctest.Example("", shown), found, doctest.REPORT_NDIFF | doctest.ELLIPSIS)


def _stripped(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.strip("\n").splitlines())
