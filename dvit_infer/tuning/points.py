"""Points to search: what may reduce a model, where, and by how much, in families of one strength each."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dvit_infer.config import Config, Stage
from dvit_infer.errors import InputError
from dvit_infer.models.registry import outliner
from dvit_infer.reduction import METHODS
from dvit_infer.tuning.search import Candidate

SEARCHED = ("evit", "tome", "predictor")  # by default, if they fit
RATES = tuple(round(0.10 + 0.02 * i, 2) for i in range(45))  # keep rates of a stage; and 1 - shares that are merged
# Blocks of the stages, as shares of the depth: the even quarters of DynamicViT and EViT, some earlier and later, and
# fewer stages.
PLACES = (
    (1 / 4, 1 / 2, 3 / 4),
    (1 / 6, 1 / 3, 1 / 2),
    (1 / 3, 1 / 2, 2 / 3),
    (1 / 2, 2 / 3, 5 / 6),
    (1 / 4, 1 / 2),
    (1 / 3, 1 / 2),
    (1 / 4,),
    (1 / 3,),
    (1 / 2,),
)
MOST_MACS = 0.99  # of the dense model's: what saves less is no point
TILE = 8  # tokens of which kernels and processors like multiples

Settings = Mapping[str, Any]
Recognise = Callable[[str, Settings], Config]


@dataclass(frozen=True)
class Point:
    """A reduction of a model.

    Attributes:
        method: its method.
        settings: what the method is told, by the names of `convert`'s arguments (`score` is an assumption).
        config: the model with this reduction.
        candidate: its name, which is that of the options of a command, its family, and its MACs.
    """

    method: str
    settings: Settings
    config: Config
    candidate: Candidate

    @property
    def name(self) -> str:
        return self.candidate.name


def keywords_of(method: str, settings: Settings) -> dict[str, Any]:
    """Return the arguments of `convert` that give a reduction."""
    assume = {name: value for name, value in settings.items() if name == "score"}
    rest = {name: value for name, value in settings.items() if name != "score"}
    return {"method": method, **rest, **({"assume": assume} if assume else {})}


def options_of(method: str, settings: Settings) -> str:
    """Return the options of a command that give a reduction."""
    words = ["--method", method]
    for name, value in settings.items():
        listed = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
        words += ["--assume", f"{name}={listed}"] if name == "score" else [f"--{name.replace('_', '-')}", listed]
    return " ".join(words)


class Points:
    """The points of one model.

    Args:
        recognise: returns the model's config with a method and its settings, or raises InputError.
        dense: its config without reduction.
        methods: those to search; None: those of `SEARCHED` that fit.

    Raises:
        InputError: a method does not exist or does not fit the model, or none does.
    """

    def __init__(self, recognise: Recognise, dense: Config, methods: Sequence[str] | None = None) -> None:
        self._recognise, self._dense = recognise, dense
        self._outline = outliner(dense)
        self._dense_macs = self._outline(dense).macs
        self.points: dict[str, Point] = {}
        self.families: dict[str, list[Candidate]] = {}
        for method in dict.fromkeys(_known(methods)):
            try:
                scored = self._score(method)
            except InputError as error:
                if methods is None:
                    continue
                raise InputError(f"methods: {str(error).removeprefix('method: ')}") from None
            for name, settings in self._settings(method):
                self._add(method, name, [one | scored for one in settings])
        if not self.families:
            what = "no method" if methods is None else f"method {', '.join(methods)}"
            raise InputError(f"model: {what} makes {dense.arch} with its {dense.num_patches} patches any smaller")

    def _score(self, method: str) -> dict[str, str]:
        """Return what a method has to be told to fit the model; raise InputError if it does not fit."""
        try:
            self._recognise(method, {})
        except InputError:
            if "score" not in METHODS[method].SETTINGS:
                raise
            self._recognise(method, {"score": "pooled"})
            return {"score": "pooled"}
        return {}

    def _settings(self, method: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield families: their names, and the settings of their points."""
        depth, patches = self._dense.body.depth, self._dense.num_patches
        if METHODS[method].EVERY_BLOCK:
            merged = [round((1 - rate) * patches) for rate in RATES]
            whole, half, third = (max(1, depth // n) for n in (1, 2, 3))
            for name, weights in (
                ("all blocks", [1] * whole),
                ("first half", [1] * half),
                ("first third", [1] * third),
                ("every other block", [1, 0] * half),
                ("fewer from block to block", list(range(depth - 1, -1, -1)) if depth > 1 else [1]),
            ):
                yield name, [{"merge": _shared(count, weights, depth)} for count in merged]
        elif METHODS[method].KEY is not None:  # its modules stand where they were trained
            yield "as trained", [{"keep_rate": rate} for rate in RATES]
        else:
            for shares in PLACES:
                blocks = tuple(dict.fromkeys(max(1, int(depth * share + 1e-9)) for share in shares))
                if blocks[-1] < depth:
                    at = f"block{'s' * (len(blocks) > 1)} {','.join(map(str, blocks))}"
                    yield at, [{"keep_rate": rate, "prune_at": blocks} for rate in RATES]

    def _add(self, method: str, family: str, settings: Sequence[Settings]) -> None:
        """Add a family, without points that keep nothing, that save nothing, or that another family has."""
        known = {point.config.reduction.stages for point in self.points.values() if point.method == method}
        found = []
        for one in settings:
            point = self._point(method, f"{method}, {family}", one, known)
            if point is not None:
                known.add(point.config.reduction.stages)
                found.append(point)
        if found:
            self.families[f"{method}, {family}"] = sorted((p.candidate for p in found), key=lambda c: c.macs)
            self.points |= {point.name: point for point in found}

    def _point(
        self, method: str, family: str, settings: Settings, known: Collection[tuple[Stage, ...]] = ()
    ) -> Point | None:
        try:
            config = self._recognise(method, settings)
        except InputError:  # a rate leaves no token, say
            return None
        if config.reduction.stages in known or not config.reduction.stages:
            return None
        if any(not stage.keep for stage in config.reduction.stages):
            return None
        macs = self._outline(config).macs / self._dense_macs
        if macs > MOST_MACS:
            return None
        return Point(method, settings, config, Candidate(options_of(method, settings), family, macs))

    def rounded(self, name: str) -> list[Point]:
        """Return points beside one of EViT, with as many tokens as a multiple of `TILE` after each stage."""
        point = self.points[name]
        reduction, prefix = point.config.reduction, getattr(point.config.body, "num_prefix", 0)
        if point.method != "evit":
            return []
        found = []
        for up in (True, False):
            counts = []
            for i, stage in enumerate(reduction.stages):
                beside = prefix + reduction.fuses(i)
                tokens = (stage.keep or 0) + beside
                whole = -(-tokens // TILE) * TILE if up else tokens // TILE * TILE
                counts.append(whole - beside)
            if all(a > b for a, b in itertools.pairwise((reduction.num_patches, *counts))) and counts[-1] > 1:
                family = f"{point.candidate.family}, rounded"
                other = self._point("evit", family, {**point.settings, "keep_rate": tuple(counts)})
                if other is not None and other.config.reduction.stages != reduction.stages:
                    self.points[other.name] = other
                    found.append(other)
        return found


def _known(methods: Sequence[str] | None) -> Sequence[str]:
    if methods is not None and (isinstance(methods, str) or not methods):
        raise InputError(f"methods: a list of {', '.join(METHODS)} is expected, not {methods!r}")
    for method in methods or ():
        if method not in METHODS:
            raise InputError(f"methods: {str(method)[:40]!r} is not one of {', '.join(METHODS)}")
    return SEARCHED if methods is None else methods


def _shared(count: int, weights: Sequence[int], depth: int) -> int | tuple[int, ...]:
    """Return the number of tokens to merge in each block: `count` in all, in proportion to the weights."""
    ends = [count * total // sum(weights) for total in itertools.accumulate(weights)]
    each = [end - start for start, end in itertools.pairwise((0, *ends))]
    schedule = (*each, *[0] * (depth - len(each)))[:depth]
    return schedule[0] if len(set(schedule)) == 1 else schedule
