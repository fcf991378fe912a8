"""Files of torch.save with a pickle of one's own, and a run over mutated ones that counts what an audit hook sees.

As a script: python odd_files.py COUNT FOLDER
"""

import argparse
import collections
import io
import pickle
import random
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ACTIONS = re.compile(
    r"import|exec|compile|code\.__new__|marshal\..*|os\.(system|exec|fork|forkpty|spawn|posix_spawn|startfile.*|putenv"
    r"|remove|rename|mkdir|rmdir|link|symlink|chmod|truncate|kill)|subprocess\.Popen|socket\..*|ctypes\..*|shutil\..*"
    r"|pickle\.find_class|builtins\.(input|breakpoint)|webbrowser\.open|urllib\..*|tempfile\..*"
)
WRITES = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000  # of the flags of os.open on Linux
INSTRUCTIONS = b"()0212QRbceiotuNsajJKX}]\x81\x82\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x95\x96\x97"


def zipped(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_pickle(whole: bytes, data: bytes) -> bytes:
    """The zip of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, data if info.filename.endswith("/data.pkl") else old.read(info))
    return buffer.getvalue()


def call(name: str, argument: str = "touch ran") -> bytes:
    """Instructions that call a function with one text."""
    module, _, attribute = name.rpartition(".")
    text = argument.encode()
    return f"c{module}\n{attribute}\n".encode() + b"X" + len(text).to_bytes(4, "little") + text + b"\x85R"


def content() -> dict[str, Any]:
    """A checkpoint with most of what a pickle may hold."""
    return {
        "model": collections.OrderedDict({"blocks.0.w": torch.ones(3, 4), "head.bias": torch.arange(4.0)}),
        "args": argparse.Namespace(lr=np.float64(0.1), size=(1, 2), names=["a", "b"], text=b"bytes"),
        "rng": np.random.RandomState(0).get_state(),
        "best": {"epoch": 3, "when": collections.Counter("aab"), "kind": torch.float16, "seen": {1, 2}},
    }


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A pickle with a few bytes changed, cut out, repeated, or put in: instructions, or calls of functions that act."""
    names = ("os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.__import__", "subprocess.Popen")
    names += ("torch.load", "numpy.load", "importlib.import_module", "webbrowser.open", "builtins.open", "this.s")
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(found))
        match chance.randrange(7):
            case 0:
                found[at] = chance.randrange(256)
            case 1:
                found[at] ^= 1 << chance.randrange(8)
            case 2:
                del found[at : at + chance.randrange(1, 16)]
            case 3:
                found[at:at] = found[at : at + chance.randrange(1, 64)]
            case 4:
                found[at:at] = bytes([chance.choice(INSTRUCTIONS)])
            case 5:
                found[at:at] = call(chance.choice(names))
            case 6:
                old = chance.choice((b"argparse\nNamespace", b"collections\nOrderedDict", b"numpy\ndtype"))
                new = chance.choice(names).rpartition(".")
                found = bytearray(bytes(found).replace(old, f"{new[0]}\n{new[2]}".encode()))
        found = found or bytearray(b".")
    return bytes(found)


def main(count: int, folder: Path) -> None:
    from dvit_infer.errors import InputError
    from dvit_infer.models.checkpoint import read_checkpoint

    seen: collections.Counter[str] = collections.Counter()
    results: collections.Counter[str] = collections.Counter()
    reading = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if reading and (ACTIONS.fullmatch(event) or (event == "open" and (int(args[2] or 0) & WRITES))):
            seen[f"{event} {args[:1]!r:.80}"] += 1

    sys.addaudithook(hook)
    chance, path = random.Random(0), folder / "odd.pth"
    whole = zipped(content())
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    buffer = io.BytesIO()
    torch.save(content(), buffer, _use_new_zipfile_serialization=False)
    newest = pickle.dumps({"epoch": 3, "names": ["a", {1, 2}], "text": b"bytes"}, 5)
    for made in (whole, buffer.getvalue()):
        path.write_bytes(made)
        read_checkpoint(path)
    for codec in ("raw-unicode-escape", "cp437", "ascii"):  # Python's own, loaded at their first use
        b"V".decode(codec)
    for i in range(count):
        kind = i % 8
        if kind == 0:
            made = mutated(buffer.getvalue(), chance)
        else:
            made = with_pickle(whole, mutated(newest if kind == 1 else data, chance))
        path.write_bytes(made)
        reading = True
        try:
            read_checkpoint(path)
            results["read"] += 1
        except InputError as error:
            results["refused" if "refused" in str(error) else "damaged"] += 1
        except BaseException as error:
            results[f"{type(error).__name__}: {error}"] += 1
        finally:
            reading = False
    print(dict(seen), dict(results), sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
