"""Shared by all commands: argument parsing, exit status, progress."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from dvit_infer.errors import InputError, KernelError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and exits with status 2."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def run(parser: Parser, command: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Parse the arguments and run the command; turn an error that the user can fix into one line and exit status 2."""
    sys.stdout, sys.stderr = (_writable(stream) for stream in (sys.stdout, sys.stderr))
    options = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))
    try:
        with _stopped_like_ctrl_c():
            status = command(options)
        sys.stdout.flush()
        return status
    except InputError as error:
        return _failed(_as_options(str(error), parser))
    except KernelError as error:
        return _failed(str(error), 1)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if SIGPIPE had ended it
    except OSError as error:
        return _failed(f"{error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except (MemoryError, RuntimeError) as error:
        from dvit_infer.utils.memory import is_allocation_failure  # here: it imports torch

        if not is_allocation_failure(error):
            raise
        return _failed("out of memory: a smaller batch, image or model would fit")


def _as_options(message: str, parser: Parser) -> str:
    """A message of the library, whose arguments are called as the user wrote them: `keep_rate: ...` is --keep-rate."""
    name = message.partition(":")[0]
    options = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    if name in options:
        return options[name] + message[len(name) :]
    from dvit_infer.models.reading import ASSUMABLE  # here: it imports torch

    return f"--assume {message}" if name in ASSUMABLE else message


def _failed(message: str, status: int = 2) -> int:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))  # keys come from files
    print(f"error: {line if len(line) < 600 else line[:600] + ' ...'}", file=sys.stderr)
    return status


def _writable(stream: TextIO | None) -> TextIO:
    """Return the stream, which writes unencodable characters as question marks; if it is closed, the null device."""
    if stream is None:
        return open(os.devnull, "w")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


_STOPPED = threading.Event()


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if a signal to end the command has arrived."""
    if _STOPPED.is_set():
        raise KeyboardInterrupt


def _signals() -> list[signal.Signals]:
    """Return the signals that end a command; none outside the main thread, which alone may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that a batch system's time limit leaves no partial file.

    A library may turn the KeyboardInterrupt into an error of its own that blames the file it was reading, so any error
    after a signal counts as the interrupt. It may also swallow the exception, as imports of compiled modules do; then
    the next progress update stops the command (`check_interrupt`).
    """
    _STOPPED.clear()

    def interrupt(signum: int, frame: object) -> NoReturn:
        _STOPPED.set()
        raise KeyboardInterrupt

    before = {
        n: signal.signal(n, interrupt) for n in _signals() if signal.getsignal(n) != signal.SIG_IGN
    }  # nohup ignores SIGHUP
    try:
        yield
    except Exception:
        check_interrupt()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopping_gently() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after the first Ctrl-C or termination signal; the second one interrupts."""
    asked, owner = threading.Event(), os.getpid()
    before = {n: signal.getsignal(n) for n in _signals()}

    def ask(signum: int, frame: object) -> None:
        if asked.is_set() or os.getpid() != owner:  # a worker process ends at once
            _STOPPED.set()
            raise KeyboardInterrupt
        asked.set()

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _joined(argv: Sequence[str]) -> list[str]:
    """Join `--prune-at -1,1` to `--prune-at=-1,1`; argparse would take the value for an option."""
    joined: list[str] = []
    for word in argv:
        if joined and re.fullmatch(r"--[a-z-]+", joined[-1]) and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def integers(text: str) -> tuple[int, ...]:
    """Parse '3,6,9' to (3, 6, 9)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 3,6,9") from None


def size(text: str) -> int | tuple[int, ...]:
    """Parse '224' to 224 and '192x256' to (192, 256)."""
    try:
        sides = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 224 or 192x256") from None
    return sides[0] if len(sides) == 1 else sides


def rates(text: str) -> float | tuple[float, ...]:
    """Parse '0.7' to 0.7, and '0.9,0.7,0.5' or '120,60,30' to a tuple."""
    found = tuple(_number(part.strip()) for part in text.split(","))
    numbers = tuple(number for number in found if not isinstance(number, str))
    if len(numbers) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a keep rate such as 0.7, nor a list such as 0.9,0.7,0.5 or (counts) 120,60,30"
        )
    return numbers[0] if len(numbers) == 1 else numbers


def assumptions(text: str) -> dict[str, Any]:
    """Parse 'num_heads=6,mean=0.5:0.5:0.5,fuse=false'.

    Returns:
        {'num_heads': 6, 'mean': (0.5, 0.5, 0.5), 'fuse': False}, for example.
    """
    chosen: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise argparse.ArgumentTypeError(f"{item!r} is not an assumption such as num_heads=6")
        between = r":(?!decreasing$)|x" if value[:1].isdigit() else ":"
        parts = [_number(part) for part in re.split(between, value.strip())]
        if name.strip() in chosen:
            raise argparse.ArgumentTypeError(f"{name.strip()} is given twice")
        chosen[name.strip()] = _FLAGS.get(value.strip(), parts[0]) if len(parts) == 1 else tuple(parts)
    return chosen


_FLAGS: dict[str, Any] = {"true": True, "false": False}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


# Options that say what the model is and where it runs: type, placeholder, help.
_MODEL_OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "arch": (str, "A", "default: recognised from keys and shapes"),
    "method": (str, "M", "predictor, evit, tome, random (a control) or none (dense); default: the file's own"),
    "keep-rate": (rates, "R", "default: the model's own, else 0.7; evit: also a list of rates or counts, one a stage"),
    "prune-at": (integers, "3,6,9", "blocks that begin with fewer tokens (evit: blocks in which they go), 0-based"),
    "merge": (str, "R", "tome: tokens merged in every block: 8, a list with one a block, or 8:decreasing"),
    "image-size": (size, "S|HxW", "default: the model's own"),
    "assume": (assumptions, "num_heads=6,skip_lam=2", "facts that the file does not contain"),
    "device": (str, "D", "cpu, cuda, cuda:1, mps (Apple); default: cuda if available, else cpu"),
    "dtype": (str, "T", "float32, bfloat16, float16, int8 (CPUs); default: bfloat16 on CUDA, float32 on a CPU"),
    "calibrate": (str, "FOLDER", "int8: measure the ranges of values on these images (static quantisation)"),
    "backend": (str, "B", "torch, triton (NVIDIA GPUs) or openvino (CPUs); default: the fastest that is installed"),
}


REDUCTION = ("method", "keep-rate", "prune-at", "merge")  # which tokens stay


def add_model_options(parser: argparse._ActionsContainer, *names: str, dtype: str | None = None) -> None:
    """Add the named model options, by default all; `dtype` is the help text of --dtype, if it differs."""
    for name in names or _MODEL_OPTIONS:
        kind, metavar, text = _MODEL_OPTIONS[name]
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=dtype if dtype and name == "dtype" else text)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """Show a bar on stderr, if that is a terminal; the block calls the yielded function with the share done."""
    if not sys.stderr.isatty():
        yield lambda share: check_interrupt()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def show(share: float) -> None:
            check_interrupt()
            bar.update(task, total=1.0, completed=share)

        yield show
