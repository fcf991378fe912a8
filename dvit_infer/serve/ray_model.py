"""A model for the actors of a cluster: a path that they can read, or files in Ray's object store, put there once."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dvit_infer.errors import InputError
from dvit_infer.models.beside import FILES
from dvit_infer.models.checkpoint import Source
from dvit_infer.models.containers import tensor_files
from dvit_infer.models.hub import is_hub_name, local_folder
from dvit_infer.onnx.engine import is_onnx
from dvit_infer.utils.files import check_name
from dvit_infer.utils.packages import need
from dvit_infer.utils.partial import partial_folder


class ModelFiles(NamedTuple):
    """The files of a model, in memory.

    Attributes:
        name: the model, as messages call it.
        path: of the file to read among `files`; ".": the folder of all.
        files: their bytes by name, uint8.
    """

    name: str
    path: str
    files: dict[str, np.ndarray]


def put(model: str | Path) -> Any:
    """Put a model into Ray's object store; return the reference, which stands for the model in `Classify` and `Embed`.

    A node fetches it once for all its actors, so that they need no common file system.

    Args:
        model: a checkpoint, a saved engine, their folder, an ONNX file, or a name on the Hugging Face Hub.

    Raises:
        InputError: There is no such file.
    """
    need("dvit.ray", "ray", extra="dvit-infer[ray]")
    import ray

    return ray.put(model_files(model))


def model_files(model: str | Path) -> ModelFiles:
    """Read the files of a model, with the JSON files beside it that say more about it.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    path = local_folder(str(model)) if is_hub_name(model) else check_name(str(model).rstrip("/") or model)
    try:
        if is_onnx(path):
            beside = [path.with_name(f"{path.name}.data")]
            found = [path]
        else:
            folder = path if path.is_dir() else path.parent
            beside = [*(folder / name for name in FILES), *(folder.glob("*.index.json") if path.is_dir() else ())]
            found = [*([] if path.is_dir() else [path]), *tensor_files(path)]
        there = dict.fromkeys([*found, *(file for file in beside if file.is_file())])
        files = {file.name: np.fromfile(file, np.uint8) for file in there}
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from None
    return ModelFiles(str(model), "." if path.is_dir() else path.name, files)


@contextlib.contextmanager
def source_of(model: Any) -> Iterator[Source]:
    """Yield what `open_model` reads: files from the object store lie in a temporary folder until the block ends.

    The folder of a process that is killed is deleted by the next that makes one. Errors in the block name the model as
    the driver does.

    Args:
        model: a path or a name on the Hugging Face Hub, a state dict, the bytes of a file, `ModelFiles`, or the
            reference in Ray's object store of any of these.
    """
    import ray

    if isinstance(model, ray.ObjectRef):
        model = ray.get(model)
    if isinstance(model, bytes):
        model = ModelFiles("model", "model", {"model": np.frombuffer(model, np.uint8)})
    if not isinstance(model, ModelFiles):
        yield model
        return
    with partial_folder(Path(tempfile.gettempdir(), "dvit-model")) as folder:
        for name, content in model.files.items():
            content.tofile(folder / name)
        source = folder / model.path
        try:
            yield source
        except InputError as error:
            raise InputError(str(error).replace(str(source), model.name)) from None
