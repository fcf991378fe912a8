"""What a checkpoint's keys, shapes and args say, what has to be assumed, and notes that tell which is which."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from dvit_infer.models.checkpoint import Checkpoint
from dvit_infer.config import METHODS, Method
from dvit_infer.errors import InputError

# What `assume` may say; a file that this project wrote says the same in its header or its args.
ASSUMABLE = (
    "num_heads",
    "skip_lam",
    "eps",
    "predictor_eps",
    "prune_at",
    "keep_rate",
    "trained_size",
    "mean",
    "std",
    "crop_pct",
    "weights",
)
MAX_PATCHES = 1 << 14  # one head's attention weights of one picture are then 1 GiB


@dataclass(frozen=True)
class Note:
    """Where one fact about the model comes from."""

    how: Literal["read", "assumed", "given"]
    what: str
    value: str
    why: str


class Reading:
    """Settles one fact after another: what the caller gave, else what the file said, else an assumption; notes each."""

    def __init__(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> None:
        if unknown := [name for name in given if name not in ASSUMABLE]:
            raise InputError(
                f"assume: {unknown[0]!r} is nothing that can be assumed; these are: {', '.join(ASSUMABLE)}"
            )
        self.name = checkpoint.name
        self.shapes = {key: tuple(value.shape) for key, value in checkpoint.state.items()}
        self.given = dict(given)
        self.said = checkpoint.said if checkpoint.is_saved_engine else _of_a_trainer(checkpoint.said)
        self.said_where = "the saved config" if checkpoint.is_saved_engine else "the file's args"
        self.notes: list[Note] = []
        self._used = {"weights"}  # of what was given; the reader of the file has seen to this one

    def note(self, how: Literal["read", "assumed", "given"], what: str, value: object, why: str) -> None:
        text = "x".join(map(str, value)) if what.endswith("_size") and isinstance(value, tuple | list) else _text(value)
        self.notes.append(Note(how, what, text, why))

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there."""
        if key not in self.shapes:
            raise InputError(f"{self.name}: missing key {key}")
        found = self.shapes[key]
        if len(found) != ndim or 0 in found:
            raise InputError(f"{self.name}: {key} has shape {found}, {ndim} dimensions, none of them 0, are expected")
        return found

    def vote(self, what: str, places: Sequence[tuple[str, int]]) -> int:
        """A size that several tensors show: the most frequent, so that one bad tensor is found out, not followed."""
        seen = [self.shapes[key][axis] for key, axis in places if len(self.shapes.get(key, ())) > axis]
        sizes = Counter(size for size in seen if size > 0)
        if not sizes:
            is_there = next((key for key, _ in places if key in self.shapes), None)
            found = f"{is_there} has shape {self.shapes[is_there]}" if is_there else f"missing key {places[0][0]}"
            raise InputError(f"{self.name}: {found}, which should tell {what}")
        return sizes.most_common(1)[0][0]

    def count(self, prefix: str) -> int:
        """How many numbered modules `prefix`0, `prefix`1, ... there are, by the highest number."""
        numbers = [key.removeprefix(prefix).split(".")[0] for key in self.shapes if key.startswith(prefix)]
        highest = max((int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) < 5), default=-1)
        if highest >= len(self.shapes):  # a made-up 'blocks.9999.x' must not build ten thousand blocks
            raise InputError(f"{self.name}: {prefix}{highest} is there, but not the {highest} before it")
        return highest + 1

    def settle(self, what: str, assumed: Any, why: str, said_as: str | None = None) -> Any:
        """Given, else said by the file (under `said_as`, if its name for it is another), else assumed."""
        self._used.add(what)
        if self.given.get(what) is not None:
            value = self.given[what]
            self.note("given", what, value, "by you")
        elif (said := self._said(what, said_as)) is not None:
            value = said[1]
            self.note("read", what, value, f"{self.said_where}: {said[0]}")
        else:
            value = assumed
            self.note("assumed", what, value, why)
        return value

    def settle_if_known(self, what: str) -> Any:
        """Given, else said by the file, else None, of which there is no note."""
        if self.given.get(what) is None and self._said(what, None) is None:
            self._used.add(what)
            return None
        return self.settle(what, None, "")

    def finish(self, arch: str) -> None:
        """Raise InputError for what was given and means nothing for this model."""
        if unused := [name for name in self.given if name not in self._used]:
            raise InputError(f"assume: {unused[0]} means nothing for {arch}")

    def origin(self, what: str) -> str:
        """How a message should call a value: by the option that gave it or the place that said it."""
        return what if self.given.get(what) is not None else f"{self.name}: {what}"

    def _said(self, what: str, said_as: str | None) -> tuple[str, Any] | None:
        for key in (what, said_as):
            if key is not None and self.said.get(key) is not None:
                return key, self.said[key]
        return None


def _of_a_trainer(args: Mapping[str, Any]) -> dict[str, Any]:
    """What a training script's arguments say of the model: only names that mean the same everywhere.

    Others mean something else there: `eps` is the optimiser's, `image_size` may be the crop's.
    """
    said = {name: args[name] for name in ("num_heads", "prune_at", "skip_lam", "base_rate", "model") if name in args}
    three = {name: args.get(name) for name in ("mean", "std")}
    crop = args.get("crop_pct")
    if crop is not None and _is_number(crop) and 0.1 <= crop <= 1:
        said["crop_pct"] = crop
    ours = args.get("dvit_infer")  # what dvit-train says beside the official names
    if isinstance(ours, dict):
        said |= {name: ours[name] for name in ("eps", "predictor_eps", "trained_size") if name in ours}
    return said | {name: value for name, value in three.items() if isinstance(value, list | tuple) and len(value) == 3}


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ",".join(map(_text, value))
    return "".join(c if c.isprintable() else "?" for c in str(value)[:80])  # it may come from the file


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def positive_int(what: str, value: Any) -> int:
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not 1 <= value < 1 << 40:
        raise InputError(f"{what}: {value!r} is no positive whole number")
    return int(value)


def positive_float(what: str, value: Any) -> float:
    if not _is_number(value) or not 1e-30 < value < 1e30:
        raise InputError(f"{what}: {value!r} is no positive number")
    return float(value)


def keep_rate(what: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value <= 1:
        raise InputError(f"{what}: {value!r} is no share of tokens to keep; a number above 0, at most 1, is expected")
    return float(value)


def block_indices(what: str, value: Any, depth: int, count: int) -> tuple[int, ...]:
    """Strictly increasing block indices, one for every predictor."""
    indices = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, Integral) for i in indices):
        raise InputError(f"{what}: {value!r} are no block indices")
    indices = tuple(map(int, indices))
    for index in indices:
        if not 0 <= index < depth:
            raise InputError(f"{what}: there is no block {index}; the model has blocks 0 to {depth - 1}")
    if list(indices) != sorted(set(indices)):
        raise InputError(f"{what}: {_text(indices)} is not strictly increasing")
    if len(indices) != count:
        raise InputError(f"{what}: {len(indices)} given ({_text(indices)}), but the weights hold {count} predictors")
    return indices


def image_size(what: str, value: Any, patch: int) -> tuple[int, int]:
    """(height, width), both multiples of the patch."""
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise InputError(f"{what}: {value!r} is no size; one number or height and width are expected")
    height, width = (positive_int(what, side) for side in sides)
    if height % patch or width % patch:
        raise InputError(f"{what}: {height}x{width} is no multiple of the patch size {patch}")
    if (height // patch) * (width // patch) > MAX_PATCHES:
        raise InputError(f"{what}: {height}x{width} is too large: over {MAX_PATCHES} patches, each attending to all")
    return height, width


def crop_pct(what: str, value: Any) -> float | None:
    if value is not None and (not _is_number(value) or not 0.1 <= value <= 1):
        raise InputError(f"{what}: {value!r} is not between 0.1 and 1")
    return None if value is None else float(value)


def three_floats(what: str, value: Any, positive: bool) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else ()
    good = all(_is_number(v) and abs(v) < 1e30 and (v > 0 or not positive) for v in values)
    if len(values) != 3 or not good:
        raise InputError(f"{what}: {value!r} are no three {'positive ' if positive else ''}numbers, one a channel")
    return tuple(map(float, values))


def method(what: str, value: Any, has_predictors: bool, name: str) -> Method:
    if value == "none":
        return "none"
    if value != "predictor":
        raise InputError(f"{what}: {value!r} is not one of {', '.join(METHODS)}")
    if not has_predictors:
        raise InputError(f"{what}: 'predictor' needs score predictors, and {name} holds none; 'none' runs it dense")
    return "predictor"
