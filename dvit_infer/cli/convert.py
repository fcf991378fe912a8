"""dvit-convert: convert a checkpoint to a verified model file, for this project's engine or as ONNX for any runtime."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, add_model_options, progress, run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dvit_infer.classifier import Verifiable
    from dvit_infer.engine import Engine
    from dvit_infer.parity.report import Report

ONNX_ONLY = ("opset", "kept", "uint8", "inline", "quantize", "classes")


def _parser() -> Parser:
    parser = Parser(prog="dvit-convert", description="Convert a checkpoint and verify it against the reference model.")
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a .pth, .pth.tar, .pt or .safetensors file, or a folder of shards"
    )
    parser.add_argument("-o", "--out", metavar="OUT", help="default: <stem>.dvit.safetensors or .dvit.onnx here")
    add_model_options(parser, dtype="float32, bfloat16, float16 or int8: for verification, and of an ONNX file")
    parser.add_argument("--format", choices=["safetensors", "onnx"], default="safetensors", help="format of the output")
    parser.add_argument(
        "--no-verify", action="store_true", help="write the file without comparing it with the reference"
    )
    parser.add_argument("--json", metavar="FILE", help="write config, notes and parity results as JSON")
    onnx = parser.add_argument_group("ONNX files", "with --format onnx")
    onnx.add_argument("--opset", type=int, metavar="N", help="17 to 21, for older runtimes; default: 20")
    onnx.add_argument(
        "--kept",
        action="store_true",
        help="add outputs kept_0, kept_1, ...: patches kept, or groups merged",
    )
    onnx.add_argument("--uint8", action="store_true", help="take uint8 images (B, H, W, 3) and normalise them inside")
    inline = "inline functions, as OpenVINO and TensorRT need; compile in OpenVINO with INFERENCE_PRECISION_HINT=f32"
    onnx.add_argument("--inline", action="store_true", help=inline)
    onnx.add_argument(
        "--quantize", metavar="int8", help="int8 weights and matrix products for CPUs; scores stay float32"
    )
    onnx.add_argument(
        "--classes", metavar="FILE", help="class names to store in the file; default: those of the checkpoint"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _convert, argv)


def _convert(options: argparse.Namespace) -> int:
    import dvit_infer as dvit
    from dvit_infer.benchmark.results import environment
    from dvit_infer.utils.files import atomic_write_json, check_output
    from dvit_infer.utils.tables import table

    write = _onnx if options.format == "onnx" else _safetensors
    if write is _safetensors and (odd := [name for name in ONNX_ONLY if getattr(options, name) not in (None, False)]):
        raise dvit.InputError(f"{odd[0]}: is for --format onnx")
    name = default_out(options.checkpoint, options.format) if options.out is None else options.out
    out = check_output(name, "out", not_this=options.checkpoint)
    json_out = None if options.json is None else check_output(options.json, "json", not_this=options.checkpoint)
    if json_out == out:
        raise dvit.InputError(f"json: {options.json} is also the model file; choose another name")
    report: Report | None = None
    with progress("converting") as show:
        engine = _engine(options)
        show(0.3)
        with contextlib.suppress(_ParityError), write(options, engine, out) as written:
            show(0.5)
            runtime = getattr(written, "outline", engine.outline).runtime
            if not options.no_verify:
                # Verify the model that the written file gives, not the one in memory.
                few = written.device.type == "cpu" and written.precision != "int8"
                report = dvit.verify(written, options.checkpoint, 8 if few else 64, _real_images(options, written))
            if json_out is not None:
                atomic_write_json(json_out, {"environment": environment(), **_found(engine, report)})
            if report is not None and not report.passed:
                raise _ParityError
    print(table(("how", "what", "value", "from"), [(n.how, n.what, n.value, n.why) for n in engine.notes]))
    print(f"{engine.config.arch}: {engine.outline.gmacs:.3f} GMACs per image as run")
    if options.format != "onnx":
        print(f"run by {runtime}")
    print("not verified, as requested" if report is None else report)
    if report is not None and not report.passed:
        print(
            f"error: {options.checkpoint}: the engine does not agree with the reference; {out} was not written",
            file=sys.stderr,
        )
        return 1
    print(f"wrote {name} ({out.stat().st_size / 2**20:.1f} MiB)")
    if options.inline:
        from dvit_infer.onnx.export import OPENVINO_HINT

        print(f"in OpenVINO: compile it with {OPENVINO_HINT}; its default may be bfloat16, which keeps other patches")
    return 0


def _engine(options: argparse.Namespace) -> "Engine":
    import dvit_infer as dvit
    from dvit_infer.utils.devices import resolve_device

    to_onnx = options.format == "onnx"
    if to_onnx and options.dtype == "int8":
        raise dvit.InputError("dtype: an ONNX file is made int8 by --quantize int8")
    if to_onnx and options.backend:
        raise dvit.InputError("backend: is for engines; ONNX Runtime runs ONNX files")
    device = resolve_device("cpu" if to_onnx else options.device)
    # What is verified is loaded from the file; before, a CPU has to fold the weights only, not to compile them.
    only_folds = to_onnx or (device.type == "cpu" and options.dtype != "int8" and not options.no_verify)
    return dvit.convert(
        options.checkpoint,
        arch=options.arch,
        keep_rate=options.keep_rate,
        prune_at=options.prune_at,
        method=options.method,
        merge=options.merge,
        image_size=options.image_size,
        assume=options.assume,
        device=device,
        dtype=options.dtype or ("float32" if to_onnx else None),
        calibrate=None if to_onnx else options.calibrate,
        backend="torch" if only_folds else options.backend,
    )


@contextlib.contextmanager
def _safetensors(options: argparse.Namespace, engine: "Engine", out: Path) -> "Iterator[Verifiable]":
    """Write the engine's weights and yield the engine loaded from them; the file is kept if the block succeeds."""
    import dvit_infer as dvit
    from dvit_infer.utils.files import atomic_write

    with atomic_write(out, "out") as part:
        engine.write(part)
        yield (
            engine
            if options.no_verify
            else dvit.load(part, device=engine.device, dtype=engine.precision, backend=options.backend)
        )


@contextlib.contextmanager
def _onnx(options: argparse.Namespace, engine: "Engine", out: Path) -> "Iterator[Verifiable]":
    """Write an ONNX file and yield it loaded; the file is kept if the block succeeds."""
    import dvit_infer as dvit
    from dvit_infer.images.classes import read_classes
    from dvit_infer.onnx.export import write_onnx
    from dvit_infer.utils.files import atomic_write_files
    from dvit_infer.utils.packages import need

    if not options.no_verify:
        need("format: onnx", "onnx", "onnxruntime", extra="dvit-infer[onnx]")
    if options.calibrate is not None and options.quantize is None:
        raise dvit.InputError("calibrate: is for --quantize int8")
    classes = None if options.classes is None else read_classes(options.classes, engine.config.num_classes)
    with atomic_write_files(out, "out") as part:
        write_onnx(
            engine,
            part,
            dtype=engine.dtype,
            opset=20 if options.opset is None else options.opset,
            kept=options.kept,
            uint8=options.uint8,
            inline=options.inline,
            quantize=options.quantize,
            calibration=_calibration(options, engine),
            labels=engine.labels if classes is None else classes.labels,
        )
        yield engine if options.no_verify else dvit.load_onnx(part, device=options.device)


def _real_images(options: argparse.Namespace, engine: "Verifiable") -> "torch.Tensor | None":
    """Return 64 images of the calibration folder, others than those of the calibration if there are as many.

    int8 is verified on these: ranges of real images do not fit random ones.
    """
    if options.calibrate is None or engine.only_uint8:
        return None
    import torch

    from dvit_infer.images.calibration import CALIBRATE_WITH, calibration_images
    from dvit_infer.models.preprocessing import preprocess_for

    drawn = calibration_images(options.calibrate, preprocess_for(engine.config), CALIBRATE_WITH + 64)
    return torch.cat(list(drawn))[-64:]


def _calibration(options: argparse.Namespace, engine: "Engine") -> "Iterator[np.ndarray] | None":
    if options.calibrate is None:
        return None
    from dvit_infer.onnx.quantize import calibration_batches

    return calibration_batches(options.calibrate, engine.config, uint8=options.uint8)


def _found(engine: "Engine", report: "Report | None") -> dict[str, Any]:
    return {
        "config": {**asdict(engine.config), **engine.config.facts()},
        "notes": [asdict(note) for note in engine.notes],
        "gflops": engine.outline.gmacs,
        "parity": None if report is None else {"passed": report.passed, **asdict(report)},
    }


class _ParityError(Exception):
    """Raised to leave the block that writes the file, so that the file is discarded."""


def default_out(checkpoint: str, kind: str) -> str:
    """Return the name of the file that is written for a checkpoint if none is given, in the current folder."""
    stem = Path(checkpoint).name or Path(checkpoint).absolute().name
    for suffix in (
        ".tar",
        ".json",
        ".index",
        ".pth",
        ".pt",
        ".ckpt",
        ".bin",
        ".npz",
        ".safetensors",
        *([".dvit"] if kind == "onnx" else []),
    ):
        stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    return f"{stem}.dvit.{kind}"


if __name__ == "__main__":
    sys.exit(main())
