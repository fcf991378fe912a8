"""dvit-convert: a checkpoint in, a verified model file out."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, assumptions, integers, progress, run, size

if TYPE_CHECKING:
    from dvit_infer.engine import Engine
    from dvit_infer.families.reading import Note
    from dvit_infer.parity import Report


def _parser() -> Parser:
    parser = Parser(prog="dvit-convert", description="Convert a checkpoint and verify it against the reference model.")
    parser.add_argument("checkpoint", metavar="CKPT", help="a .pth, .pth.tar, .pt or .safetensors file")
    parser.add_argument("-o", "--out", metavar="OUT", help="default: <stem>.dvit.safetensors in this folder")
    parser.add_argument("--arch", metavar="A", help="default: recognised from keys and shapes")
    parser.add_argument("--keep-rate", type=float, metavar="R", help="default: the file's base_rate, else 0.7")
    parser.add_argument("--prune-at", type=integers, metavar="3,6,9", help="blocks before which tokens are dropped")
    parser.add_argument("--method", metavar="M", help="predictor or none (dense)")
    parser.add_argument("--image-size", type=size, metavar="S|HxW", help="default: as trained")
    parser.add_argument("--assume", type=assumptions, metavar="num_heads=6,skip_lam=2", help="what the file cannot say")
    parser.add_argument("--device", metavar="D", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16, to verify in")
    parser.add_argument("--format", choices=["safetensors"], default="safetensors", help="of the file written")
    parser.add_argument("--no-verify", action="store_true", help="write the file without comparing answers")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _convert, argv)


def _convert(options: argparse.Namespace) -> int:
    import dvit_infer as dvit
    from dvit_infer.files import check_output, whole_file
    from dvit_infer.results import environment, write_json
    from dvit_infer.tables import table

    name = _default_out(options.checkpoint) if options.out is None else options.out
    out = check_output(name, "out", not_this=options.checkpoint)
    json_out = None if options.json is None else check_output(options.json, "json", not_this=options.checkpoint)
    if json_out == out:
        raise dvit.InputError(f"json: {options.json} is where the model goes; choose another name")
    report = None
    with progress("converting") as show:
        engine = dvit.convert(
            options.checkpoint,
            arch=options.arch,
            keep_rate=options.keep_rate,
            prune_at=options.prune_at,
            method=options.method,
            image_size=options.image_size,
            assume=options.assume,
            device=options.device,
            dtype=options.dtype,
        )
        notes = engine.notes
        show(0.3)
        with contextlib.suppress(_ParityError), whole_file(out, "out") as part:
            engine.write(part)
            if not options.no_verify:
                # What is verified is what the file gives back, not what was in memory when it was written.
                engine = dvit.load(part, device=engine.device, dtype=engine.dtype)
                show(0.5)
                report = dvit.verify(engine, options.checkpoint, num_images=8 if engine.device.type == "cpu" else 64)
            if json_out is not None:
                write_json(json_out, {"environment": environment(), **_found(engine, notes, report)})
            if report is not None and not report.passed:
                raise _ParityError
    print(table(("how", "what", "value", "from"), [(n.how, n.what, n.value, n.why) for n in notes]))
    print(f"{engine.config.arch}: {engine.graph.gflops:.3f} x 10^9 multiply-adds a picture as run")
    print("not verified, as asked" if report is None else report)
    if report is not None and not report.passed:
        print(
            f"error: {options.checkpoint}: the engine's answers are not the reference's; {out} was not written",
            file=sys.stderr,
        )
        return 1
    print(f"wrote {name} ({out.stat().st_size / 2**20:.1f} MiB)")
    return 0


def _found(engine: "Engine", notes: "list[Note]", report: "Report | None") -> dict[str, Any]:
    return {
        "config": asdict(engine.config),
        "notes": [asdict(note) for note in notes],
        "gflops": engine.graph.gflops,
        "parity": None if report is None else {"passed": report.passed, **asdict(report)},
    }


class _ParityError(Exception):
    """Leaves the block that writes the file, so that it is not written."""


def _default_out(checkpoint: str) -> str:
    stem = Path(checkpoint).name
    for suffix in (".tar", ".pth", ".pt", ".safetensors"):
        stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    return f"{stem}.dvit.safetensors"


if __name__ == "__main__":
    sys.exit(main())
