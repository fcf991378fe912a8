"""Compare an engine with the reference model: logits, top-1, kept sets, weights, node outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from dvit_infer.backends.precision import as_asked
from dvit_infer.classifier import Verifiable
from dvit_infer.engine import Engine, checkpoint_of
from dvit_infer.errors import InputError
from dvit_infer.graph import Graph, Node
from dvit_infer.images.synthetic import sample_images, sample_uint8_images
from dvit_infer.images.tensors import normalise
from dvit_infer.models.checkpoint import Source
from dvit_infer.models.folded import folded_graph
from dvit_infer.models.reference import EvalOutput, Reference
from dvit_infer.models.registry import build_reference
from dvit_infer.parity.report import Report
from dvit_infer.utils.devices import MICRO_BATCH

LOGIT_TOLERANCE = 1e-4  # float32
MARGIN = 1e-5  # float32: a kept set is compared only if the gap at its cut, and at every earlier one, is larger
RMS_FACTOR = 2.0  # bfloat16 and float16: the engine's rms error may be at most this times plain PyTorch's
LEAST_TOP1 = 0.98  # int8: agreement with float32
MOST_RMS = 0.5  # relative to the logits' rms: beyond this error the outputs have nothing in common
NODE_TOLERANCE = 1e-5  # rms error of a node's output over its rms, beyond RMS_FACTOR times plain PyTorch's


@torch.no_grad()
def verify(engine: Verifiable, source: Source, num_images: int = 64, images: torch.Tensor | None = None) -> Report:
    """Compare an engine, or an ONNX file, with the reference model built from `source` and the engine's config.

    It passes if every engine weight follows from the file's and, over `num_images` random images: in float32,
    logits are within 1e-4 and kept sets are equal where their cut is clear (gap over 1e-5); in bfloat16 and float16,
    with the reference's kept sets given, the rms error is at most twice that of plain PyTorch in that dtype and top-1
    agreement no lower than its own by more than two standard errors. An int8 model passes if its error is within
    `MOST_RMS` and top-1 agreement at least 98%, or lower by no more than two standard errors: the report says how
    much it changed.

    Args:
        engine: any engine, or the result of `load_onnx`.
        source: the checkpoint it was made from, as for `convert`.
        num_images: the number of images; with fewer than 64 the check is weaker.
        images: images to use in place of random ones, as for a call of the engine.

    Raises:
        InputError: the file cannot be read, or holds another model than the engine's.
    """
    if num_images < 1:
        raise InputError(f"num_images: {num_images}; at least one image is needed")
    checkpoint = checkpoint_of(engine, source)
    config = engine.config
    if images is not None:
        given, num_images = images, len(images)
    else:
        given = (sample_uint8_images if engine.only_uint8 else sample_images)(num_images, config.image_size, seed=1)
    images = normalise(given, config.mean, config.std) if given.dtype == torch.uint8 else given
    reference = build_reference(config, checkpoint).to(engine.device)
    expected = evaluate(reference, images)
    if not torch.isfinite(expected.logits).all():
        raise InputError(f"{checkpoint.name}: the reference model itself gives NaN or Inf; its weights are too large")
    logits, own_kept = engine(given, return_kept=True)
    differs = _differs(own_kept, expected.kept, num_images)
    if engine.dtype == torch.float32:
        plain, rounded = reference, expected
    else:
        plain = build_reference(engine.config, checkpoint).to(engine.device, engine.dtype)
        rounded = evaluate(plain, images, expected.kept)
        differs = torch.ones_like(differs)
    plain_logits = rounded.logits
    quantised = engine.precision == "int8"
    consistent = True
    if engine.dtype != torch.float32 and own_kept:
        # Its own choice is checked only here: the logits must equal those with the same choice given.
        again = engine(given, kept=own_kept)
        consistent = _errors(logits, again)[1] <= max(_errors(again, plain_logits)[1], 1e-5)
    if expected.kept and differs.any() and not quantised:
        logits = torch.where(differs[:, None], engine(given, kept=expected.kept), logits)
    clear = torch.cumprod(expected.margin > MARGIN, dim=1).bool()
    equal = [
        clear[:, s] & (own == kept).all(dim=1)
        for s, (own, kept) in enumerate(zip(own_kept, expected.kept, strict=True))
    ]
    max_error, rms_error = _errors(logits, expected.logits)
    plain_max_error, plain_rms_error = _errors(plain_logits, expected.logits)
    top1, plain_top1 = (_agreement(x, expected.logits) for x in (logits, plain_logits))
    features = None
    if isinstance(engine, Engine) and config.num_classes and not config.reduction.stages:
        features = _features_errors(engine.features(given), expected.features, rounded.features, engine.dtype)
    graph = folded_graph(config, checkpoint, torch.device("cpu"), engine.dtype)
    wrong_weight = _wrong_weight(engine, graph)

    output: Literal["logits", "embedding"] = "logits" if config.num_classes else "embedding"
    choice: Literal["kept", "merged"] = "merged" if config.reduction.merges else "kept"
    overlap = _same_groups if config.reduction.merges else _overlap
    failures = [f"weights: {wrong_weight}"] if wrong_weight else []
    if quantised:
        scale = expected.logits.square().mean().sqrt().item()
        if not rms_error <= MOST_RMS * scale:
            failures.append(f"{output}: rms error {rms_error:.2e} is over half of their rms, {scale:.2e}")
        if config.num_classes and top1 + 2 * _standard_error(top1, 1.0, num_images) < LEAST_TOP1:
            failures.append(f"top-1 agreement: {top1:.1%} is below {LEAST_TOP1:.0%} by more than chance")
    elif engine.dtype == torch.float32:
        if not max_error <= LOGIT_TOLERANCE:  # so that NaN fails
            failures.append(f"{output}: max error {max_error:.2e} is over {LOGIT_TOLERANCE:.0e}")
        if features is not None and not features[0] <= LOGIT_TOLERANCE:
            failures.append(f"features: max error {features[0]:.2e} is over {LOGIT_TOLERANCE:.0e}")
        for stage, same in enumerate(equal):
            if missed := int(clear[:, stage].sum() - same.sum()):
                failures.append(f"{choice} tokens, stage {stage}: {missed} clear sets differ")
    else:
        if not rms_error <= RMS_FACTOR * plain_rms_error:
            failures.append(f"{output}: rms error {rms_error:.2e} is over {RMS_FACTOR:g} x {plain_rms_error:.2e}")
        if features is not None and not features[0] <= RMS_FACTOR * features[1]:
            failures.append(f"features: rms error {features[0]:.2e} is over {RMS_FACTOR:g} x {features[1]:.2e}")
        if not consistent:
            failures.append("logits: they differ when the engine's own choice of patches is given")
        if config.num_classes and top1 < plain_top1 - 2 * _standard_error(top1, plain_top1, num_images):
            failures.append(f"top-1 agreement: {top1:.1%} is below plain PyTorch's {plain_top1:.1%}")
    return Report(
        model=f"{config.arch}, {config.reduction}",
        dtype=engine.precision,
        device=str(engine.device),
        num_images=num_images,
        max_error=max_error,
        rms_error=rms_error,
        plain_max_error=plain_max_error,
        plain_rms_error=plain_rms_error,
        top1_agreement=top1,
        plain_top1_agreement=plain_top1,
        kept_compared=tuple(clear.sum(dim=0).tolist()),
        kept_equal=tuple(int(same.sum()) for same in equal),
        kept_overlap=tuple(overlap(own, kept) for own, kept in zip(own_kept, expected.kept, strict=True)),
        choice=choice,
        wrong_weight=wrong_weight,
        first_difference=None
        if quantised
        else _first_difference(
            engine.node_values(graph.nodes, given[:2], [stage[:2] for stage in expected.kept]),
            *(_record(model, images[:2], [stage[:2] for stage in expected.kept]) for model in (reference, plain)),
        ),
        failures=tuple(failures),
        output=output,
        features_error=None if features is None else features[0],
        plain_features_error=None if features is None else features[1],
    )


def _features_errors(
    ours: torch.Tensor, expected: torch.Tensor | None, plain: torch.Tensor | None, dtype: torch.dtype
) -> tuple[float, float] | None:
    """Return the errors of features and of plain PyTorch's: max in float32, else rms; None: there are none."""
    if expected is None or plain is None:
        return None
    which = 0 if dtype == torch.float32 else 1
    return _errors(ours, expected)[which], _errors(plain, expected)[which]


@torch.no_grad()
def evaluate(model: Reference, images: torch.Tensor, kept: Sequence[torch.Tensor] = ()) -> EvalOutput:
    """Run the model in micro-batches; logits are returned in float32."""
    like = next(model.parameters())
    size = MICRO_BATCH[like.device.type]
    parts = []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        given = [stage[part] for stage in kept] or None
        inputs = images[part].to(like.device, like.dtype)
        with as_asked(inputs.device, inputs.dtype):
            parts.append(model.evaluate(inputs, given))
    stages = [torch.cat(stage) for stage in zip(*(part.kept for part in parts), strict=True)]
    features = [part.features for part in parts if part.features is not None]
    logits, margins = (torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "margin"))
    return EvalOutput(logits.float(), stages, margins, torch.cat(features).float() if features else None)


def _differs(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
    """Return (B,) whether any stage of an image kept other tokens."""
    different = [(a != b).any(dim=1) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(different).any(dim=0) if different else torch.zeros(batch, dtype=torch.bool)


def _same_groups(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the share of patches whose group, (B, N), has the same lowest patch in both."""
    return (ours == theirs).double().mean().item()


def _overlap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the mean share of positions common to two (B, k) sets: those that occur twice in both together."""
    twice = torch.cat([ours, theirs], dim=1).sort(dim=1).values.diff(dim=1) == 0
    return twice.sum().item() / theirs.numel()


def _errors(logits: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    difference = (logits - expected).double()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def _agreement(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return (logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item()


def _standard_error(first: float, second: float, count: int) -> float:
    """Return the standard error of the difference of two shares, each moved towards 1/2 (Agresti and Caffo 2000)."""
    shares = [(share * count + 1) / (count + 2) for share in (first, second)]
    return float(sum(p * (1 - p) / (count + 2) for p in shares) ** 0.5)


def _wrong_weight(engine: Verifiable, anew: Graph) -> str | None:
    """Return the first tensor of the engine that differs from folding the checkpoint again, or None."""
    found, expected = engine.own_tensors(), engine.tensors(anew)
    if odd := sorted(found.keys() ^ expected.keys()):
        return f"{odd[0]} is {'unexpected' if odd[0] in found else 'missing'}"
    for name, want in expected.items():
        want, own = want.double(), found[name].cpu().double()
        # Sums may be rounded in another order elsewhere; a weight that is 1% off is far outside this.
        largest = want.abs().max() if want.numel() else 0.0  # a model may have no prefix tokens
        allowed = 1e-5 * want.abs() + 1e-7 * largest
        if engine.precision == "int8" and want.ndim == 2 and not name.startswith("prune."):
            largest = want.abs().amax(dim=engine.fan_in_dim, keepdim=True)
            allowed = allowed + 0.51 * largest / 127  # half a quantisation step of its output channel
        if own.shape != want.shape or not ((own == want) | ((own - want).abs() <= allowed)).all():  # also False for NaN
            return f"{name} does not follow from the file"
    return None


def _first_difference(
    ours: Sequence[tuple[Node, torch.Tensor]], reference: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor]
) -> str | None:
    """Return the first node whose output differs from the reference by more than plain PyTorch's rounding, or None."""
    for node, out in ours:
        if node.equals not in reference:
            continue
        want, rounded = (_rows_of(out, there[node.equals]) for there in (reference, plain))
        scale = max(want.double().square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)
        error, rounding = (_errors(x.float(), want)[1] / scale for x in (out, rounded))
        if not error <= RMS_FACTOR * rounding + NODE_TOLERANCE:
            return f"{node.name} (relative rms {error:.1e})"
    return None


def _rows_of(out: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Return only the rows that the engine computes, which may be the first few; those of a map are its positions."""
    if there.ndim == out.ndim + 1:
        there = there.flatten(1, 2)
    return there if out.ndim < 3 else there[:, : out.shape[1]]


def node_outputs(
    engine: Engine, model: Reference, images: torch.Tensor, kept: Sequence[torch.Tensor]
) -> list[tuple[Node, torch.Tensor, torch.Tensor]]:
    """Return every node with a counterpart in the model, its output, and the model's value there.

    Args:
        images: (B, 3, H, W), one micro-batch.
        kept: the kept sets for both, one per stage; empty for a dense engine.
    """
    reference = _record(model, images, kept)
    found = engine.node_values(engine.outline.nodes, images, kept)
    return [(node, out, _rows_of(out, reference[node.equals])) for node, out in found if node.equals in reference]


def _record(model: Reference, images: torch.Tensor, kept: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs and outputs of the model's modules, by `module:in` and `module:out`."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen[f"{name}:in"], seen[f"{name}:out"] = args[0], out

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        like = next(model.parameters())
        inputs = images.to(like.device, like.dtype)
        with as_asked(inputs.device, inputs.dtype):
            seen[":out"] = model.evaluate(inputs, kept or None).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    return seen
