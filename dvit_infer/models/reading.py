"""Resolve facts about a model from a checkpoint's keys, shapes and args or by assumption, with a note for each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dvit_infer.config import CROP_MODES, IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Body, Config
from dvit_infer.errors import InputError
from dvit_infer.models.beside import Facts, facts_of
from dvit_infer.models.checkpoint import Checkpoint
from dvit_infer.models.facts import is_number, text_of

# The facts that `assume` accepts; a file written by this project holds them in its header or its args.
ASSUMABLE = (
    "num_heads",
    "skip_lam",
    "eps",
    "predictor_eps",
    "prune_at",
    "keep_rate",
    "merge",
    "fuse",
    "prop_attn",
    "score",
    "trained_size",
    "no_embed_class",
    "act",
    "pool",
    "rope",
    "map_heads",
    "map_act",
    "resample",
    "mean",
    "std",
    "crop_pct",
    "crop_mode",
    "interpolation",
    "weights",
)


_ALIKE = (  # types of Hugging Face that have the same keys
    {"vit", "deit", "vit_mae"},
    {"dinov2", "dinov2_with_registers"},
    {"siglip", "siglip2"},
)
_IMAGES = ("mean", "std", "crop_pct", "crop_mode", "interpolation", "image_size")  # facts of how images are prepared


@dataclass(frozen=True)
class Note:
    """The origin of one fact about the model."""

    how: Literal["read", "assumed", "given"]
    what: str
    value: str
    why: str


class Reading:
    """Resolves facts one by one and notes each.

    Their order: the caller's, those of the saved config or of the trainer's arguments, those that a module states,
    those of timm's `pretrained_cfg` in the file and of the JSON files beside it, those that the keys imply, and
    assumptions.

    Args:
        checkpoint: its keys and shapes, a trainer's arguments and the JSON files beside it are read.
        given: the caller's facts.
        stored: the config in the header of a saved engine.
    """

    def __init__(self, checkpoint: Checkpoint, given: Mapping[str, Any], stored: Config | None = None) -> None:
        if unknown := [name for name in given if name not in ASSUMABLE]:
            raise InputError(f"assume: {unknown[0]!r} cannot be assumed; these can: {', '.join(ASSUMABLE)}")
        self.name = checkpoint.name
        self.shapes = {key: tuple(value.shape) for key, value in checkpoint.state.items()}
        self.given = dict(given)
        self.stored = stored
        self.metadata = _of_a_trainer(checkpoint.metadata) if stored is None else _of_a_config(stored)
        self.metadata_source = "the file's args" if stored is None else "the saved config"
        self.notes: list[Note] = []
        self.beside: Facts = {}
        self.by_type: tuple[str, ...] = ()  # those of them that only the type of the model implies
        self.in_file = checkpoint.in_file
        if stored is None:
            self._read_beside(checkpoint)
        self._used = {"weights"}  # names of given facts that were used; the reader of the file uses this one

    def _read_beside(self, checkpoint: Checkpoint) -> None:
        """Take the facts that the file states in timm's way, or a file beside it; note what is not used of them."""
        inside = checkpoint.metadata.get("pretrained_cfg")
        sources = {"the file": {"pretrained_cfg": inside}} if isinstance(inside, Mapping) else {}
        beside = dict(checkpoint.beside)
        whole = "open_clip_config.json"
        beside.pop("config.json" if checkpoint.owner == "open_clip" and whole in beside else whole, None)
        found, unused = facts_of({**sources, **beside}, self.shapes)
        self.by_type, _ = found.pop("by type", ((), ""))
        if found.get("owner", ("", ""))[0] == "huggingface" != checkpoint.owner:
            found = {what: fact for what, fact in found.items() if what in _IMAGES}
            unused.append(("config.json", "describes a model of Hugging Face, but these are not Hugging Face's keys"))
        elif other := _of_another_type(found, checkpoint):
            found["unsupported"] = other, "config.json"
        others = _under_other_names(checkpoint.metadata)
        self.beside = {**checkpoint.implied, **others, **found, **checkpoint.stated}
        for source, why in unused:
            self.note("read", source, "not used", why)

    def take_as_given(self, facts: Facts) -> None:
        """Take facts of an architecture that the caller named; what the file says of its images stays."""
        images = {what: fact for what, fact in self.beside.items() if what in _IMAGES}
        known = {what: fact for what, fact in self.beside.items() if what != "unsupported"}
        self.beside = {**known, **{what: (v, f"{where} (given)") for what, (v, where) in facts.items()}, **images}

    def take_trained(self, facts: Facts, assumed: Sequence[str]) -> None:
        """Take the facts of a trainer that is known; those `assumed` are not in the file."""
        self.beside = {**facts, **self.beside}
        self.by_type += tuple(assumed)

    def note(self, how: Literal["read", "assumed", "given"], what: str, value: object, why: str) -> None:
        if isinstance(value, Mapping):  # rotary positions; what is 0 or False is not there
            text = " ".join(f"{name}={text_of(part)}" for name, part in value.items() if part)
        elif what.endswith("_size") and isinstance(value, tuple | list):
            text = "x".join(map(str, value))
        else:
            text = text_of(value)
        self.notes.append(Note(how, what, text, why))

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of a required tensor."""
        if key not in self.shapes:
            raise InputError(f"{self.name}: missing key {self.in_file(key)}")
        found = self.shapes[key]
        if len(found) != ndim or 0 in found:
            raise InputError(
                f"{self.name}: {self.in_file(key)} has shape {found}, {ndim} dimensions, none of them 0, are expected"
            )
        return found

    def vote(self, what: str, places: Sequence[tuple[str, int]]) -> int:
        """Return the most frequent of the sizes that several tensors show, so that one bad tensor is reported."""
        seen = [self.shapes[key][axis] for key, axis in places if len(self.shapes.get(key, ())) > axis]
        sizes = Counter(size for size in seen if size > 0)
        if not sizes:
            is_there = next((key for key, _ in places if key in self.shapes), None)
            missing = f"missing key {self.in_file(places[0][0])}"
            found = f"{self.in_file(is_there)} has shape {self.shapes[is_there]}" if is_there else missing
            raise InputError(f"{self.name}: {found}, which should show {what}")
        return sizes.most_common(1)[0][0]

    def count(self, prefix: str) -> int:
        """Return the number of modules `prefix`0, `prefix`1, ..., by the highest number."""
        numbers = [key.removeprefix(prefix).split(".")[0] for key in self.shapes if key.startswith(prefix)]
        highest = max((int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) < 5), default=-1)
        if highest >= len(self.shapes):  # a made-up 'blocks.9999.x' must not build ten thousand blocks
            raise InputError(f"{self.name}: {prefix}{highest} is there, but not the {highest} before it")
        return highest + 1

    def resolve(self, what: str, assumed: Any, why: str, stored_as: str | None = None) -> Any:
        """Return the given value, else that in the metadata (under `what` or `stored_as`), else the assumed one."""
        self._used.add(what)
        if self.given.get(what) is not None:
            value = self.given[what]
            self.note("given", what, value, "by you")
        elif (found := self._stated(what, stored_as)) is not None:
            value, why = found
            self.note("assumed" if self.only_by_type(what) else "read", what, value, why)
        else:
            value = assumed
            self.note("assumed", what, value, why)
        return value

    def use_reduction(self, method: str) -> None:
        """Read the facts of a reduction from the part of the saved config that has this method, if there is one."""
        if self.stored is not None:
            runs, learned = self.stored.reduction, self.stored.learned
            found = runs if runs.method == method != "none" else learned
            self.metadata |= {**dict(found.settings), "prune_at": found.blocks or None}

    def resolve_if_known(self, what: str) -> Any:
        """Return the given value, else that in the metadata, else None without a note."""
        if not self.states(what):
            self._used.add(what)
            return None
        return self.resolve(what, None, "")

    def states(self, what: str) -> bool:
        """Return whether the caller, the file or a file beside it states a fact."""
        return self.given.get(what) is not None or self._stated(what, None) is not None

    def only_by_type(self, what: str) -> bool:
        """Return whether nothing but the type of the model says what a fact is."""
        return what in self.by_type and self.given.get(what) is None and self._stated(what, None) == self.beside[what]

    def stated(self, what: str) -> tuple[Any, str]:
        """Return a fact that the caller, the file or a file beside it states, and where it stands; without a note."""
        if self.given.get(what) is not None:
            return self.given[what], "by you"
        found = self._stated(what, None)
        assert found is not None
        return found

    def amend(self, what: str, value: object, why: str) -> None:
        """Change the value in a note that has been made, and add the reason."""
        index = max(i for i, note in enumerate(self.notes) if note.what == what)
        note = self.notes[index]
        self.notes[index] = replace(note, value=text_of(value), why=f"{note.why}; {why}")

    def finish(self, arch: str, body: Body | None = None) -> None:
        """Raise InputError for a given fact that means nothing for this model, unless it is one of its body anyway."""
        for name, value in self.given.items():
            if name not in self._used and body is not None and value == getattr(body, name, None) is not None:
                self.resolve(name, value, "")
        if unused := [name for name in self.given if name not in self._used]:
            raise InputError(f"{unused[0]}: means nothing for {arch}")

    def origin(self, what: str) -> str:
        """Return a name for a value in messages: the option that gave it, or the file that holds it, and its key."""
        if self.given.get(what) is not None:
            return what
        found, args = self._stated(what, None), "the file's args: "
        key = found[1].removeprefix(args) if found is not None and found[1].startswith(args) else what
        return f"{self.name}: {key}"

    def value_of(self, what: str, stored_as: str | None = None) -> Any:
        """Return the value in the metadata (under `what` or `stored_as`), or None, without a note."""
        found = self._stated(what, stored_as)
        return None if found is None else found[0]

    def _stated(self, what: str, stored_as: str | None) -> tuple[Any, str] | None:
        """Return the value that the metadata or the files beside it state, and where it stands."""
        for key in (what, stored_as):
            if key is not None and self.metadata.get(key) is not None:
                return self.metadata[key], f"{self.metadata_source}: {key}"
        return self.beside.get(what)


def _of_another_type(found: Facts, checkpoint: Checkpoint) -> str | None:
    """Return why a config.json of Hugging Face is not that of these keys, or None if it is or may be."""
    config = checkpoint.beside.get("config.json")
    if checkpoint.owner != "huggingface" or "unsupported" in found:
        return None
    if isinstance(config, str):  # without it heads, eps and activation would be guessed
        return f"its config.json {config}; mend it, or remove it so that heads, eps and the like are assumed"
    if not isinstance(config, Mapping):
        return None
    stated, implied = (facts.get("model", (None,))[0] for facts in (found, checkpoint.implied))
    if isinstance(config.get("model_type"), str):
        alike = stated == implied or any({stated, implied} <= group for group in _ALIKE)
        return None if alike else f"its type is {stated!r}, but the keys are those of {implied!r}"
    return f"its type is {text_of(config['model_type'])[:40]!r}, no name" if "model_type" in config else None


def _of_a_config(config: Config) -> dict[str, Any]:
    """Return the facts in a saved config by their own names; those of its reduction are added once it is chosen."""
    parts = {"body", "reduction", "learned"}
    facts = {name: value for name, value in vars(config).items() if name not in parts}
    return {**facts, **vars(config.body), "method": config.reduction.method}


def _of_a_trainer(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about the model in a training script's arguments: only names with a single meaning.

    Others have a different meaning there: `eps` is the optimiser's, `image_size` may be the crop's.
    """
    found = {name: args[name] for name in ("num_heads", "prune_at", "skip_lam", "base_rate", "model") if name in args}
    three = {name: args.get(name) for name in ("mean", "std")}
    crop = args.get("crop_pct")
    if isinstance(default := args.get("imagenet_default_mean_and_std"), bool):  # of ConvNeXt's and DynamicViT's trainer
        usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if default else dict.fromkeys(three, (0.5,) * 3)
        three = {name: usual[name] if value is None else value for name, value in three.items()}
    if crop is not None and is_number(crop) and 0.1 <= crop <= 1:
        found["crop_pct"] = crop
    for name, known in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
        if isinstance(args.get(name), str) and args[name] in known:
            found[name] = args[name]
    ours = args.get("dvit_infer")  # written by dvit-train beside the official names
    if isinstance(ours, dict):
        found |= {name: ours[name] for name in ("eps", "predictor_eps", "trained_size") if name in ours}
    return found | {name: value for name, value in three.items() if isinstance(value, list | tuple) and len(value) == 3}


def _under_other_names(args: Mapping[str, Any]) -> Facts:
    """Return the facts that trainers call otherwise: DeiT's crop, and TokenReduction's DynamicViT."""
    found: Facts = {}
    crop = args.get("eval_crop_ratio")
    if crop is not None and is_number(crop) and 0.1 <= crop <= 1:
        found["crop_pct"] = crop, "the file's args: eval_crop_ratio"
    blocks, rates = args.get("reduction_loc"), args.get("keep_rate")
    if isinstance(blocks, list | tuple) and blocks:
        found["prune_at"] = blocks, "the file's args: reduction_loc"
        if isinstance(rates, list | tuple) and is_powers(rates):
            found["keep_rate"] = rates[0], "the file's args: keep_rate"
    return found


def is_powers(rates: Sequence[Any]) -> bool:
    """Return whether keep rates are r, r^2, r^3 and so on; a single r stands for as many as there are stages."""
    numbers = [float(rate) for rate in rates if is_number(rate)]
    return (
        len(numbers) == len(rates) > 0
        and 0 < numbers[0] <= 1
        and all(abs(rate - numbers[0] ** (i + 1)) < 1e-9 for i, rate in enumerate(numbers))
    )
