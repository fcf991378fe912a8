"""An engine of any file that commands take: a checkpoint, a saved engine or an ONNX file."""

from typing import Any

from dvit_infer.classifier import Classifier
from dvit_infer.engine import convert
from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import Source
from dvit_infer.onnx.engine import is_onnx, load_onnx


def open_model(source: Source, **options: Any) -> Classifier:
    """Make an engine.

    Args:
        source: as for `convert`, or the path of an ONNX file.
        options: those of `convert`; of an ONNX file only `device`.

    Raises:
        InputError: The file or an option cannot be used.
    """
    if not is_onnx(source):
        return convert(source, **options)
    given = [name for name, value in options.items() if name != "device" and value is not None]
    if "backend" in given:
        raise InputError(f"backend: {source} runs in ONNX Runtime; the checkpoint has a choice")
    if given:
        raise InputError(f"{given[0]}: {source} was converted with this fixed; convert the checkpoint again")
    return load_onnx(str(source), device=options.get("device"))
