"""Read which parts a plain ViT has and who trained it; refuse parts that are not supported, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from dvit_infer.config import Config, Size
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.inputs import read_inputs
from dvit_infer.models.reading import Reading
from dvit_infer.models.reducing import check_counts, read_reductions
from dvit_infer.models.vit.body import ViT
from dvit_infer.reduction.settings import Trunk


def trainer_of(read: Reading, family: str, predictors: int, num_prefix: int) -> str | None:
    """Return why preprocessing is known without being stated: its trainer has only one. None: it is not known.

    timm has weights with DeiT's keys that want another mean and std, and anybody may train such a model. But only
    DynamicViT's trainer makes predictors, only token labeling's an LV-ViT, and only DeiT's a distillation token; a file
    of DeiT's trainer says so.
    """
    if predictors:
        return "the score predictors are of DynamicViT's trainer"
    if family == "lvvit":
        return "token labeling's trainer"
    model = read.metadata.get("model")
    if num_prefix == 2 or (isinstance(model, str) and model.startswith("deit")):
        return "DeiT's trainer"
    return None


def check_channels(read: Reading, first: str) -> None:
    """Raise InputError for a model of images with other than three channels, by its first convolution."""
    kernel = read.shapes.get(first, ())
    if len(kernel) == 4 and kernel[1] not in (0, 3):
        channels = f"{kernel[1]} channel{'s' if kernel[1] > 1 else ''}"
        raise InputError(f"{read.name}: is made for images of {channels} ({first}); 3 are supported")


def check_classes(read: Reading, class_heads: Sequence[str]) -> None:
    """Raise InputError for a model without classes."""
    if not any(f"{head}.{part}" in read.shapes for head in class_heads for part in ("weight", "bias")):
        raise InputError(f"{read.name}: has no classes (no head.weight), which a DynamicViT has")


def note_trained_as(read: Reading, predictors: int) -> None:
    """Note the name that the trainer gave the model, and what it trained that is not in the file."""
    if isinstance(model := read.metadata.get("model"), str):
        read.note("read", "trained as", model, f"{read.metadata_source}: model")
    if not predictors and read.metadata.get("base_rate") is not None:
        why = f"{read.metadata_source}: base_rate; the file holds no predictors, so the model is dense"
        read.note("read", "trained as", "DynamicViT", why)


def has_layer_scale(read: Reading, depth: int) -> bool:
    """Return whether most blocks have factors for their branches' channels, so that one without is reported."""
    found = sum(key.endswith((".ls1.gamma", ".ls2.gamma")) for key in read.shapes)
    if found > depth:
        read.note("read", "layer_scale", "yes", "keys: ls1.gamma and ls2.gamma; folded into proj and fc2")
    return found > depth


def has_no_qkv_bias(read: Reading, family: str) -> bool:
    """Return whether no block of a DeiT has a bias for queries, keys and values; LV-ViT never has one."""
    without = family == "deit" and not any(key.endswith(".attn.qkv.bias") for key in read.shapes)
    if without:
        read.note("read", "qkv bias", "none", "keys: no attn.qkv.bias")
    return without


def one_of(read: Reading, what: str, assumed: Any, why: str, known: tuple[str, ...]) -> Any:
    """Return a resolved value; raise InputError unless it is one of the known ones."""
    value = read.resolve(what, assumed, why)
    if value not in known:
        raise InputError(f"{read.origin(what)}: {str(value)[:40]!r} is not one of {', '.join(known)}")
    return value


def num_heads_of(read: Reading, dim: int, known: tuple[int, str] | None = None) -> int:
    """Return the number of heads, which no file shows: stated, else known by the width or the architecture and why.

    Raises:
        InputError: it does not divide the width, or nothing says what it is.
    """
    if known is None and dim % 64 and not read.states("num_heads"):
        unused = ("config.json", "not used")
        beside = next((f"; config.json {note.why}" for note in read.notes if (note.what, note.value) == unused), "")
        ask = "assume num_heads=... says how many"
        raise InputError(f"num_heads: {read.name} is {dim} wide, no multiple of 64; {ask}{beside}")
    assumed, why = known or (dim // 64, "heads of 64 channels")
    heads = check.positive_int(read.origin("num_heads"), read.resolve("num_heads", assumed, why))
    if dim % heads:
        raise InputError(f"{read.origin('num_heads')}: {heads} does not divide the width {dim}")
    return heads


def finished_config(
    read: Reading,
    options: Mapping[str, Any],
    *,
    body: ViT,
    image_size: Size,
    predictors: int = 0,
    implied: str | None = None,
    **facts: Any,
) -> Config:
    """Return the config of a body: resolve which tokens stay and how images are prepared; check that all was used.

    Args:
        read: the facts.
        options: `image_size` and `method`, as the caller gave them.
        body: what the model is.
        image_size: the size that it runs at.
        predictors: the number of score predictors among the weights.
        implied: why preprocessing that nothing states is known (`read_inputs`).
        facts: the other fields of the config.
    """
    rows, columns = body.grid(image_size)
    learned_by = "predictor" if predictors else None
    reads_patches = body.pool != "token" or bool(body.stem_dim)  # LV-ViT's auxiliary logits
    trunk = Trunk(body.depth, body.embed_dim, rows * columns, body.class_tokens, reads_patches)
    reduction, learned = read_reductions(read, options.get("method"), trunk, learned_by, predictors)
    config = Config(
        body=body,
        image_size=image_size,
        reduction=reduction,
        learned=learned,
        **facts,
        **read_inputs(read, implied),
    )
    read.finish(config.arch, body)
    check_counts(read, reduction, image_size, options.get("image_size") is not None)
    return config
