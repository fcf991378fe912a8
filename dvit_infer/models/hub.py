"""Models on the Hugging Face Hub, by huggingface_hub: its cache first, then the network."""

import importlib.util
import os
import re
from pathlib import Path

from dvit_infer.errors import InputError
from dvit_infer.models.beside import FILES as FACTS
from dvit_infer.models.containers import SUFFIXES, has_weights
from dvit_infer.models.facts import text_of
from dvit_infer.models.torch_file import first_line

_PREFIX = re.compile(r"hf[-_]hub:")
_NAME = re.compile(r"(?!.*\.\.)(?:hf[-_]hub:|(?=timm/))([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
# Of two forms of the same weights the second is downloaded only where the first is missing.
_FORMS = (["*.safetensors", "*.safetensors.index.json"], ["*.bin", "*.bin.index.json"])


def is_hub_name(source: str | Path) -> bool:
    """Return whether a source names a model on the Hub; a file or folder that is called so comes first.

    Raises:
        InputError: it says that it is such a name, and is none.
    """
    if not isinstance(source, str) or os.path.exists(source):
        return False
    is_name = _NAME.fullmatch(source) is not None
    if not _PREFIX.match(source):
        return is_name and not source.endswith(SUFFIXES)
    if not is_name:
        raise InputError(
            f"{text_of(source)}: names no model on the Hugging Face Hub; hf-hub:user/name is expected, or "
            "hf-hub:user/name@revision"
        )
    return True


def local_folder(name: str) -> Path:
    """Return the folder of a model in the cache of huggingface_hub, after downloading it if it is not there.

    Raises:
        InputError: huggingface_hub is not installed, or neither its cache nor the network has the model.
    """
    found = _NAME.fullmatch(name)
    assert found is not None
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"{name}: names a model on the Hugging Face Hub; pip install huggingface_hub reads it, or download its "
            "folder and give that"
        )
    from huggingface_hub import snapshot_download

    why = "it holds no weights of PyTorch"
    for is_local in (True, False):
        for form in _FORMS:
            patterns = [*FACTS, *form]
            try:
                folder = Path(
                    snapshot_download(found[1], revision=found[2], allow_patterns=patterns, local_files_only=is_local)
                )
            except _failures() as error:
                why = f"{type(error).__name__}: {first_line(str(error))}"
                break
            if has_weights(folder):
                return folder
    raise InputError(f"{name}: is neither in the cache of huggingface_hub nor can be downloaded ({why})")


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors of huggingface_hub's cache, of the network and of the server.

    Its own derive from OSError or ValueError; what else its transport raises, requests' from OSError, httpx's not.
    """
    if importlib.util.find_spec("httpx") is None:
        return OSError, ValueError
    import httpx  # type: ignore[import-not-found,unused-ignore]

    return OSError, ValueError, httpx.HTTPError
