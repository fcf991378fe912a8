"""Hold one result file against an earlier one of the same machine; exit status 1 on a regression.

    python bench/compare.py OLD.json NEW.json

A row is a regression if it is slower by more than the noise of the two files, or its answer is further off. What both
files measured of PyTorch alone (the reference, eager) tells how much faster or slower the machine was: taken out.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvit_infer.cli.common import Parser, run
from dvit_infer.errors import InputError
from dvit_infer.tables import table

NAMES = ("op", "model", "keep_rate", "how", "mode", "device", "dtype", "batch", "shape")
OF_PYTORCH = ("reference", "eager")
LEAST = 0.03  # the least noise believed: what medians of quiet runs differ by
FURTHER_OFF, ROUNDING = 3.0, 1e-4  # an answer is further off by this factor, where it is no longer rounding


@dataclass(frozen=True)
class Measured:
    """Microseconds of one row: the median, and how far apart its 20th and 80th percentiles are as a share of it."""

    us: float
    spread: float
    error: float


def read(path: str) -> tuple[dict[str, Any], dict[tuple[Any, ...], Measured]]:
    """Environment and rows of a result file.

    Raises:
        InputError: it cannot be read, or is no result file of this version.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error})") from None
    try:
        where, rows = content["environment"], content["rows"]
        where["machine"]
        found = {_name(row): _measured(row) for row in rows if "us" in row or "images_per_s" in row}
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: is no result file of this version ({type(error).__name__}: {error})") from None
    if not found:
        raise InputError(f"{path}: is no result file of this version (no row in it has a time)")
    return where, found


def _name(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(json.dumps(row.get(name)) for name in NAMES)


def _measured(row: Mapping[str, Any]) -> Measured:
    if "us" in row:
        us, low, high = row["us"], row.get("p20_us", row["us"]), row.get("p80_us", row["us"])
        error = row.get("max_error")
    else:
        us, low, high = (1e6 / row[f"{p}images_per_s"] for p in ("", "p80_", "p20_"))
        error = row["max_logit_error"]
    if not all(math.isfinite(value) and value > 0 for value in (us, low, high)):
        raise ValueError(f"a time of {us}")
    return Measured(us, (high - low) / us, math.inf if error is None else error)


def _compare(options: argparse.Namespace) -> int:
    (old_where, old), (new_where, new) = read(options.old), read(options.new)
    if old_where["machine"] != new_where["machine"]:
        raise InputError(f"{options.new}: was measured on {new_where['machine']}, the other on {old_where['machine']}")
    common = [name for name in old if name in new]
    if not common:
        raise InputError(f"{options.new}: has no row in common with {options.old}")
    how = NAMES.index("how")
    steady = [new[n].us / old[n].us for n in common if json.loads(n[how]) in OF_PYTORCH]
    drift = statistics.median(steady) if steady else 1.0
    rows, regressions = [], []
    for name in common:
        ratio = new[name].us / old[name].us / drift
        noise = max(LEAST, (old[name].spread + new[name].spread) / 2)
        slower = ratio > 1 + noise and json.loads(name[how]) not in OF_PYTORCH
        worse = max(ROUNDING, FURTHER_OFF * old[name].error) < new[name].error < math.inf
        verdict = " and ".join(["slower"] * slower + ["further off"] * worse)
        label = " ".join(str(json.loads(part)) for part in name if part != "null")
        if verdict:
            regressions.append(f"{label}: {verdict}")
        faster = "faster" if ratio < 1 / (1 + noise) else ""
        cells = (f"{old[name].us:.1f}", f"{new[name].us:.1f}", f"{ratio:.3f} x", f"{noise:.0%}")
        rows.append((label, *cells, f"{old[name].error:.1e}", f"{new[name].error:.1e}", verdict or faster))
    columns = ("row", ">old us", ">new us", ">time", ">noise", ">old error", ">new error", "verdict")
    print(table(columns, rows, title=f"{old_where['machine']}: {old_where['commit']} to {new_where['commit']}"))
    print(f"machine: PyTorch alone took {drift:.3f} x its time of before; taken out" if steady else "drift: unknown")
    for what, names in (("only in the old", old.keys() - new.keys()), ("only in the new", new.keys() - old.keys())):
        if names:
            print(f"{len(names)} rows {what} file")
    if regressions:
        print(f"error: {len(regressions)} regressions: {'; '.join(regressions)}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    return run(parser, _compare, argv)


if __name__ == "__main__":
    sys.exit(main())
