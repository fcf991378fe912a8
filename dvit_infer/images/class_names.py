"""The classes that names stand for: names of class folders, or of classes in a label file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dvit_infer.errors import InputError
from dvit_infer.images.class_lists import WORDNET
from dvit_infer.images.classes import ClassMap
from dvit_infer.utils.text import listed, plural

_ILSVRC_CLASSES = 1000
_REMEDY = "; --classes FILE says which they are, by lines of a class and a name"


@dataclass(frozen=True)
class Resolved:
    """The class of each name, how it was found, and what may be wrong with that."""

    classes: Mapping[str, int]
    how: str
    warnings: tuple[str, ...] = ()


class Names:
    """The names of classes that no model gives a meaning: each is a class, in the order in which it is first resolved.

    Attributes:
        names: of the classes so far, of all folders that were read with this object.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.noun = "class"

    def of(self, where: str, noun: str) -> "Names":
        """Return itself, for classes of this noun."""
        self.noun = noun
        return self

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def resolve(self, names: Sequence[str], others: Sequence[str] = ()) -> Resolved:
        """Return the classes of the names; those without images are none."""
        self.names += sorted(set(names) - set(self.names))
        return Resolved({name: self.names.index(name) for name in names}, "their names are the classes")


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


class Resolver:
    """Finds the classes of names.

    Args:
        where: what messages begin with.
        noun: what has these names, e.g. "class folder".
        num_classes: classes of the model.
        given: the map of --classes.
        own: class names in the model's file.
    """

    def __init__(
        self, where: str, noun: str, num_classes: int, given: ClassMap | None, own: Mapping[int, str] | None
    ) -> None:
        self.where, self.noun, self.num_classes, self.given = where, noun, num_classes, given
        is_named = own is not None and any(name != f"LABEL_{index}" for index, name in own.items())  # of Hugging Face
        self.own = ClassMap.of_labels("the model's own labels", own) if own is not None and is_named else None

    def resolve(self, names: Sequence[str], others: Sequence[str] = ()) -> Resolved:
        """Return the classes of the names.

        In this order: the given map; the model's own labels; whole numbers are classes, counted from 0; else the
        classes are in the order of the names, as many as the model has.

        Args:
            names: distinct names that have images.
            others: names without images, which only keep their place in the order if there is room for them.

        Raises:
            InputError: Names are unknown, more than the model has classes, or may stand for several classes.
        """
        numbers = all(map(_is_number, names))
        if self.given is not None:
            if not numbers or any(name in self.given.folders for name in names):
                if unknown := [name for name in names if not self.given.of_name(name)]:
                    count = f"{len(unknown)} of {plural(len(names), self.noun)}"
                    raise InputError(f"classes: {self.given.path}: does not name {count}: {listed(unknown)}")
                return Resolved({name: self.given.of_folder(name) for name in names}, f"by {self.given.path}")
            if self.given.numbers:
                return self._by_ilsvrc(names, self.given)
        elif self.own is not None:
            unknown = [name for name in names if not self.own.of_name(name)]
            if not unknown:
                return Resolved({name: self.own.of_folder(name) for name in names}, f"by {self.own.path}")
            if len(unknown) < len(names) or not (numbers or self._all_of_wordnet(names, others)):
                self._refuse(names, f"{len(unknown)} not among the model's own labels: {listed(unknown)}")
        for kind, is_kind in (("whole numbers", _is_number), ("WordNet ids", WORDNET.fullmatch)):
            odd = [name for name in names if not is_kind(name)]
            if odd and 2 * len(odd) <= len(names):
                self._refuse(names, f"most are {kind}, but not {listed(odd)}")
        if len(names) > self.num_classes:
            raise InputError(
                f"{self.where}: {plural(len(names), self.noun)}, but the model has {self.num_classes} classes{_REMEDY}"
            )
        return self._by_number(names) if numbers else self._in_order(names, others)

    def _by_ilsvrc(self, names: Sequence[str], given: ClassMap) -> Resolved:
        if unknown := [name for name in names if int(name) not in given.numbers]:
            self._refuse(names, f"not among the numbers in {given.path}: {listed(unknown)}")
        return Resolved({name: given.numbers[int(name)] for name in names}, f"ILSVRC's numbers, by {given.path}")

    def _by_number(self, names: Sequence[str]) -> Resolved:
        values = {name: int(name) for name in sorted(names, key=int)}
        found, most = sorted(set(values.values())), self.num_classes
        if len(found) < len(names):
            self._refuse(names, "two of them are the same number")
        ordered = list(values)
        if found[-1] >= most:
            if found != list(range(1, most + 1)):
                self._refuse(
                    names, f"as numbers they are classes, and {found[-1]} is none of the classes 0 to {most - 1}"
                )
            if most == _ILSVRC_CLASSES:
                self._refuse(
                    names,
                    "numbers from 1 to 1000 may be ILSVRC's own, which are in another order than the classes of "
                    "ImageNet models; its map_clsloc.txt says which they are",
                )
            if sorted(ordered) != ordered and "folder" in self.noun:
                self._refuse(
                    names,
                    f"numbers from 1 to {most} may be classes from 1 on, or folders in the order of text "
                    "(1, 10, 2), as torchvision's ImageFolder numbers them",
                )
            warning = f"{self.where}: the numbers of the {self.noun}s begin at 1: {most} is taken as class {most - 1}"
            return Resolved({n: v - 1 for n, v in values.items()}, "their numbers, less one", (warning,))
        warnings = []
        if "folder" in self.noun and min(map(len, names)) < len(str(most - 1)):  # not padded with zeros
            warnings.append(
                f"{self.where}: {plural(len(names), self.noun)} taken as the classes that their names say; a model "
                "trained with torchvision's ImageFolder on such folders has them in the order of text (0, 1, 10, 2): "
                "if yours is, give --classes a list of the folders in that order"
            )
        if most > 1 and found == list(range(1, most)):
            warnings.append(
                f"{self.where}: no {self.noun} is called 0: if their numbers begin at 1, all are taken as the wrong "
                "class; --classes maps them"
            )
        elif most == _ILSVRC_CLASSES and found[0] > 0:
            warnings.append(
                f"{self.where}: no {self.noun} is 0: if the numbers are ILSVRC's own, from 1 to 1000, all are taken as "
                "the wrong class; --classes map_clsloc.txt translates them"
            )
        return Resolved(values, "their numbers are the classes", tuple(warnings))

    def _all_of_wordnet(self, names: Sequence[str], others: Sequence[str]) -> bool:
        ids = [name for name in (*names, *others) if WORDNET.fullmatch(name)]
        return len(ids) == len(names) + len(others) == self.num_classes

    def _in_order(self, names: Sequence[str], others: Sequence[str]) -> Resolved:
        ordered = sorted((*names, *others)) if len(names) + len(others) <= self.num_classes else sorted(names)
        wordnet = all(WORDNET.fullmatch(name) for name in names)
        if len(ordered) < self.num_classes and wordnet:
            self._refuse(names, "the model's file does not say which classes these WordNet ids are")
        warnings: tuple[str, ...] = ()
        if len(ordered) < self.num_classes:
            warnings = (
                f"{self.where}: {plural(len(ordered), self.noun)} for {self.num_classes} classes, taken as classes 0 "
                f"to {len(ordered) - 1} in the order of their names: the accuracy is wrong unless that is so; "
                "--classes says which they are",
            )
        own = set(names)
        classes = {name: index for index, name in enumerate(ordered) if name in own}
        order = "the folders' order" if "folder" in self.noun else "the order of their names"
        return Resolved(classes, f"taken as classes 0 to {len(ordered) - 1}, in {order}", warnings)

    def _refuse(self, names: Sequence[str], why: str) -> NoReturn:
        count = f"{plural(len(names), self.noun)} for {self.num_classes} classes"
        raise InputError(f"{self.where}: {count}: {why}{_REMEDY}")
