"""Compare the outputs of two checkouts on the golden cases bit for bit, in float32 on a CPU.

    PYTHONPATH=.:kernels python bench/golden_bits.py OLD NEW [--all]

OLD and NEW are folders of checkouts; `git worktree add /somewhere COMMIT` makes one. Weights and images come from this
checkout, and each of the two converts and runs them in a process of its own, through the public names alone. A CPU
engine times its linears and may choose others in another process, so the second checkout runs again until both have
chosen alike. Exit status 1: some output differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvit_infer.cli.common import Parser, run
from dvit_infer.errors import InputError
from dvit_infer.images.synthetic import image
from dvit_infer.models.fill import fill

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TRIES = 6  # of a process whose linears have to be chosen as those of the other
# Executed in a checkout: every file of a folder -> how the engine runs, and a digest of its logits and kept sets.
OUTPUTS = """
import hashlib, inspect, json, sys, warnings
from pathlib import Path
import torch
import dvit_infer as dvit
warnings.simplefilter("ignore")
torch.set_num_threads(2)
found = {}
for path in sorted(Path(sys.argv[1]).glob("*.pt")):
    case = torch.load(path, weights_only=False)
    here = {"backend": "torch"} if "backend" in inspect.signature(dvit.convert).parameters else {}  # not in older ones
    engine = dvit.convert(case["checkpoint"], device="cpu", dtype="float32", **here, **case["options"])
    logits, kept = engine(case["images"], return_kept=True)
    digest = hashlib.sha256()
    for tensor in (logits, *kept):
        digest.update(tensor.contiguous().numpy().tobytes())
    graph = engine.graph
    found[path.stem] = [digest.hexdigest(), getattr(graph, "runtime", None) or graph.how]  # `how` in older checkouts
print(json.dumps(found))
"""


def write_case(case: dict[str, Any], folder: Path) -> None:
    """Write a case's checkpoint, images and options."""
    keys = case["variant"] + ("-384" if case["image_size"] == 384 else "")
    shapes = json.loads((GOLDEN / "keys" / f"{keys}.json").read_text())
    state = {
        name: torch.from_numpy(np.asarray(fill(name, tuple(shape), case["seed"], case.get("tame", False)), dtype))
        for name, (dtype, shape) in shapes.items()
    }
    assume = {"keep_rate": case["keep_rate"]}
    if case["variant"].startswith("tiny-"):
        assume |= {"num_heads": 2} | ({"skip_lam": 2.0} if "lvvit" in case["variant"] else {})
    images = torch.from_numpy(image(case["batch"], case["image_size"], case["seed"]))
    content = {"checkpoint": {"model": state}, "images": images, "options": {"assume": assume}}
    torch.save(content, folder / f"{case['id']}.pt")


def outputs(checkout: Path, folder: Path) -> dict[str, list[str]]:
    """Return digest and runtime of every case, as a checkout computes them."""
    path = os.pathsep.join(str(checkout / part) for part in (".", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", OUTPUTS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout)
    if done.returncode != 0:
        raise InputError(f"{checkout}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def compare(given: argparse.Namespace) -> int:
    for checkout in (given.old, given.new):
        if not (checkout / "dvit_infer" / "__init__.py").is_file():
            raise InputError(f"{checkout}: is no checkout of dvit_infer")
    cases = json.loads((GOLDEN / "cases.json").read_text())
    chosen = [case for case in cases if given.all or case["variant"].startswith(("tiny-", "dynamicvit-deit-s"))]
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            write_case(case, Path(folder))
        old = outputs(given.old.resolve(), Path(folder))
        for _ in range(TRIES):
            new = outputs(given.new.resolve(), Path(folder))
            if [runtime for _, runtime in old.values()] == [runtime for _, runtime in new.values()]:
                break
        else:
            raise InputError(f"{given.new}: chose other linears {TRIES} times; try on a quiet machine")
    different = [name for name in old if old[name] != new[name]]
    for name, (digest, runtime) in old.items():
        print(f"{'DIFFERENT' if name in different else 'equal'}  {name}  {digest[:12]}  {runtime}")
    print(f"{len(old) - len(different)} of {len(old)} golden cases have the same bits")
    return 1 if different else 0


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="folder of a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", help="folder of another")
    parser.add_argument("--all", action="store_true", help="large models too")
    return run(parser, compare, None)


if __name__ == "__main__":
    sys.exit(main())
