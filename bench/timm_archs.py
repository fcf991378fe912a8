"""Write dvit_infer/models/vit/timm_archs.json: what timm's registry knows of its plain vision transformers.

    PYTHONPATH=.:kernels python bench/timm_archs.py [--check]

Its config.json says little more than the name of an architecture, and weights show neither heads nor activations. Every
entry of the registry whose model is a VisionTransformer (DeiT's and FlexiViT's are), an Eva or a Beit is built without
memory for weights, which takes a minute in all; `--check` compares with the file instead of writing it.

timm imports torchvision, whose wheels are built for one version of torch each. None of its operators is called here, so
that any version will do:

    pip install --no-deps timm==1.0.31 torchvision
    pip install huggingface_hub pyyaml safetensors
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from dvit_infer.models.vit.timm_config import DEFAULTS
from dvit_infer.models.vit.timm_module import KINDS, is_timm_module, module_facts, reason_of
from dvit_infer.models.vit.timm_values import pool_of
from dvit_infer.utils.packages import import_beside_torchvision

OUT = Path(__file__).parents[1] / "dvit_infer" / "models" / "vit" / "timm_archs.json"
_NOT_OF_THE_ARCH = ("owner", "model", "resample", "num_classes", "pool", "unsupported")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    check = parser.parse_args().check
    text = written(*registry())
    if check:
        same = OUT.read_text() == text
        print(f"{OUT.name} is {'what' if same else 'not what'} timm's registry says")
        return 0 if same else 1
    OUT.write_text(text)
    print(f"{OUT}: {len(json.loads(text)['archs'])} architectures, {len(text) / 1024:.0f} KiB")
    return 0


def registry() -> tuple[str, dict[str, dict[str, Any]], dict[str, str]]:
    """Return timm's version, its plain vision transformers by name, and the names that it had for some before."""
    timm = import_beside_torchvision("timm")
    from timm.models import _registry as known

    archs = {}
    for name in timm.list_models():
        module = sys.modules[known.model_entrypoint(name).__module__]
        if not any(isinstance(value, type) and value.__name__ in KINDS for value in vars(module).values()):
            continue
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = timm.create_model(name)
        if is_timm_module(model):
            archs[name] = entry(model)
    renamed = {old: str(new).split(".")[0] for old, new in known.get_deprecated_models().items()}
    return timm.__version__, archs, {old: new for old, new in renamed.items() if new in archs}


def entry(model: Any) -> dict[str, Any]:
    """Return the facts of a model without those in `DEFAULTS`."""
    kind = KINDS[type(model).__name__]
    include = getattr(model, "pool_include_prefix", False)
    found = {what: value for what, (value, _) in module_facts(model).items() if what not in _NOT_OF_THE_ARCH}
    reason = reason_of(model)
    if reason not in (None, pool_of(model.global_pool, kind, include)[1]):  # model_args may choose another pooling
        found["unsupported"] = reason
    height, width = found["image_size"]
    found["image_size"] = height if height == width else [height, width]
    found |= {"kind": kind, "global_pool": model.global_pool, "include_prefix": include}
    sized = ("pos_embed", "relative_position_bias_table")  # of the size that the model was trained for
    found["any_size"] = not any(name.endswith(sized) for name, _ in model.named_parameters())
    return {what: value for what, value in found.items() if what not in DEFAULTS or value != DEFAULTS[what]}


def written(version: str, archs: dict[str, Any], renamed: dict[str, str]) -> str:
    """Return the text of the file: one architecture a line."""

    def lines(of: dict[str, Any]) -> str:
        return ",\n".join(
            f"{json.dumps(name)}:{json.dumps(of[name], sort_keys=True, separators=(',', ':'))}" for name in sorted(of)
        )

    return f'{{"timm":{json.dumps(version)},"archs":{{\n{lines(archs)}\n}},"renamed":{{\n{lines(renamed)}\n}}}}\n'


if __name__ == "__main__":
    raise SystemExit(main())
