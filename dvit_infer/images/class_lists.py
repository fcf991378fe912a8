"""Lists of classes as text: one name a line, or a number and a name a line."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

WORDNET = re.compile(r"n\d{8}")
_SEPARATOR = r"(?:\s*[,;:\t]\s*|\s+)"
_NUMBER_FIRST = re.compile(rf"(\d{{1,9}}){_SEPARATOR}(\S.*)")
_NUMBER_LAST = re.compile(rf"(.*\S){_SEPARATOR}(\d{{1,9}})")
_ILSVRC = re.compile(r"(n\d{8})\s+(\d{1,4})\s+(\S+)")
_WORDNET_FIRST = re.compile(rf"(n\d{{8}}){_SEPARATOR}(\S.*)")
_HEADER = re.compile(r"(index|idx|id|number|class|class_id|class_index|label|name|names|class_name|folder)", re.I)


class Line(NamedTuple):
    """A class of a list: the number of its line, its class, its names, and the number that ILSVRC gives it."""

    line: int
    label: int
    names: list[str]
    ilsvrc: int | None = None


def parse(text: str, wrong: Callable[[int, str], Exception]) -> list[Line]:
    """Parse a list of classes. All its lines have one of these forms:

    * a name: the first line is class 0 (`imagenet_classes.txt`, `synset.txt`); a WordNet id may precede the name;
    * a class and a name, or a name and a class, separated by a comma or white space; a header may precede them;
    * a WordNet id, ILSVRC's own number of it, a name (`map_clsloc.txt`): the classes are the ids in sorted order.

    Args:
        text: the content of the file.
        wrong: makes the error for the number of a line, from 1, and a reason.

    Raises:
        Exception: a line has another form than most, or is empty, by `wrong`.
    """
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not any(lines):
        raise wrong(1, "is empty; names of classes are expected")
    for number, line in enumerate(lines, 1):
        if not line or "\0" in line:
            raise wrong(number, "is empty" if not line else "is no text")
    if found := _all(lines, _ILSVRC):
        rank = {name: index for index, name in enumerate(sorted({line[1] for line in found}))}
        return [Line(n, rank[m[1]], [m[1], m[3]], int(m[2])) for n, m in enumerate(found, 1)]
    begin = 2 if _is_header(lines) else 1
    lines = lines[begin - 1 :]
    for form, at, named in ((_NUMBER_FIRST, 1, 2), (_NUMBER_LAST, 2, 1)):
        matches = [form.fullmatch(line) for line in lines]
        if 2 * sum(match is not None for match in matches) <= len(lines):
            continue
        for number, match in enumerate(matches, begin):
            if match is None:
                raise wrong(number, "is not a class and its name, as most lines are")
        return [Line(n, int(m[at]), [_unquoted(m[named])]) for n, m in enumerate(matches, begin) if m is not None]
    if found := _all(lines, _WORDNET_FIRST):
        return [Line(n, n - 1, [m[1], m[2]]) for n, m in enumerate(found, 1)]
    return [Line(n, n - 1, [_unquoted(line)]) for n, line in enumerate(lines, 1)]


def _all(lines: Sequence[str], form: re.Pattern[str]) -> list[re.Match[str]]:
    """Return the matches of all lines; an empty list if one does not match."""
    matches = [match for line in lines if (match := form.fullmatch(line)) is not None]
    return matches if len(matches) == len(lines) else []


def _is_header(lines: Sequence[str]) -> bool:
    words = re.split(r"[\s,;:]+", lines[0])
    return len(lines) > 1 and len(words) == 2 and all(_HEADER.fullmatch(word) for word in words)


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name
