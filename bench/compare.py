"""Compare a result file with an earlier one of the same machine; exit status 1 on a regression.

    python bench/compare.py OLD.json NEW.json      # each of version 1 or 2

A row is a regression if it is slower by more than the noise of the two files, or less accurate. Rows of plain PyTorch
(the reference, eager) in both files measure the drift of the machine's speed, which is factored out.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dvit_infer.benchmark.results import read_results
from dvit_infer.cli.common import Parser, run
from dvit_infer.errors import InputError
from dvit_infer.utils.tables import table

NAMES = ("op", "model", "method", "keep_rate", "runtime", "variant", "device", "dtype", "batch", "shape", "load")
OF_PYTORCH = ("reference", "eager")
LEAST = 0.03  # minimum noise: medians of quiet runs differ by this
FURTHER_OFF, ROUNDING = 3.0, 1e-4  # less accurate: the error grew by this factor, and is above rounding
LESS_OFTEN = 0.1  # less accurate: top-1 agreement fell by this share of the images


@dataclass(frozen=True)
class Measured:
    """The figures of one row.

    Attributes:
        us: the median, microseconds.
        spread: distance between the 20th and 80th percentiles, relative to the median; None: not in the file.
        error: error of the output; None if the file has null: NaN, Inf or not measured.
        agreement: top-1 agreement; None for single ops.
    """

    us: float
    spread: float | None
    error: float | None
    agreement: float | None


def read(path: str) -> tuple[dict[str, Any], dict[tuple[Any, ...], Measured]]:
    """Return the environment and rows of a result file.

    Raises:
        InputError: It cannot be read, has an unknown version, or is not a result file.
    """
    content = read_results(path)
    try:
        where, rows = content["environment"], content["rows"]
        where["machine"], where.get("commit")
        found = {_name(row): _measured(row) for row in rows if _is_timed(row)}
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: is not a result file ({type(error).__name__}: {error})") from None
    if not found:
        raise InputError(f"{path}: is not a result file (no row in it has a time)")
    return where, found


def _name(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(json.dumps(row.get(name)) for name in NAMES)


def _is_timed(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a timing of this project; measured limits of the machine are not."""
    return ("us" in row or "images_per_s" in row) and not str(row.get("runtime")).startswith("measured limit")


def _measured(row: Mapping[str, Any]) -> Measured:
    if "us" in row:
        us, low, high = row["us"], row.get("p20_us"), row.get("p80_us")
        error, agreement = row.get("max_error"), None
    else:
        us, low, high = (1e6 / row[f"{p}images_per_s"] for p in ("", "p80_", "p20_"))
        error, agreement = row["max_logit_error"], row.get("top1_agreement")
    times = [value for value in (us, low, high) if value is not None]
    if not all(math.isfinite(value) and value > 0 for value in times):
        raise ValueError(f"a time of {us}")
    for value in (error, agreement):
        if value is not None and not isinstance(value, int | float):
            raise TypeError(f"{value!r} is no number")
    return Measured(us, None if None in (low, high) else (high - low) / us, error, agreement)


def _noise(old: Measured, new: Measured) -> float | None:
    """Return the difference of medians that noise explains; None if unknown, as a file has no percentiles."""
    if old.spread is None or new.spread is None:
        return None
    return max(LEAST, (old.spread + new.spread) / 2)


def _is_further_off(old: Measured, new: Measured) -> bool:
    if old.agreement is not None and (new.agreement is None or new.agreement < old.agreement - LESS_OFTEN):
        return True
    if old.error is None:
        return False
    return new.error is None or not new.error <= max(ROUNDING, FURTHER_OFF * old.error)


def _compare(options: argparse.Namespace) -> int:
    (old_where, old), (new_where, new) = read(options.old), read(options.new)
    if old_where["machine"] != new_where["machine"]:
        raise InputError(f"{options.new}: was measured on {new_where['machine']}, the other on {old_where['machine']}")
    common = [name for name in old if name in new]
    if not common:
        raise InputError(f"{options.new}: has no row in common with {options.old}")
    runtime = NAMES.index("runtime")
    steady = [new[n].us / old[n].us for n in common if json.loads(n[runtime]) in OF_PYTORCH]
    drift = statistics.median(steady) if steady else 1.0
    rows, regressions = [], []
    for name in common:
        before, after = old[name], new[name]
        ratio = after.us / before.us / drift
        noise = _noise(before, after)
        is_ours = json.loads(name[runtime]) not in OF_PYTORCH
        slower = is_ours and noise is not None and ratio > 1 + noise
        verdict = " and ".join(["slower"] * slower + ["further off"] * _is_further_off(before, after))
        label = " ".join(str(json.loads(part)) for part in name if part != "null")
        if verdict:
            regressions.append(f"{label}: {verdict}")
        faster = "faster" if noise is not None and ratio < 1 / (1 + noise) else ""
        times = f"{before.us:.1f}", f"{after.us:.1f}", f"{ratio:.3f} x", "?" if noise is None else f"{noise:.0%}"
        errors = ("-" if one.error is None else f"{one.error:.1e}" for one in (before, after))
        rows.append((label, *times, *errors, verdict or faster))
    columns = ("row", ">old us", ">new us", ">time", ">noise", ">old error", ">new error", "verdict")
    print(table(columns, rows, title=f"{old_where['machine']}: {old_where.get('commit')} to {new_where.get('commit')}"))
    print(f"machine: plain PyTorch took {drift:.3f} x its earlier time; factored out" if steady else "drift: unknown")
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
