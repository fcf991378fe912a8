"""Files that give the class of each image: CSV, and ILSVRC's ground truth."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dvit_infer.errors import InputError
from dvit_infer.images.class_lists import WORDNET
from dvit_infer.images.find import is_image

_FILE = {"file", "filename", "file_name", "filepath", "path", "image", "image_id", "imageid", "img", "name", "id"}
_CLASS = {
    *("class", "class_id", "classid", "class_index", "class_name", "label", "labels", "label_id", "target", "category"),
    *("category_id", "index", "wnid", "synset", "ground_truth", "predictionstring"),
}
_DELIMITERS = ",;\t "
# Kaggle's ILSVRC solution has an id and its boxes; tables of numbers with gaps have 3.0 for 3.
_FIRST_OF = re.compile(rf"({WORDNET.pattern})\s|(\d+)\.0+$")
_NUMBER_AT_END = re.compile(r"(\d{1,12})(?:\.\w+)?$")


@dataclass(frozen=True)
class LabelFile:
    """Classes of images as written in a file, by the names of the images or by their numbers.

    Attributes:
        path: the file.
        rows: (line, name of the image, class); the name is "" if the file has classes alone.
    """

    path: str
    rows: Sequence[tuple[int, str, str]]

    @property
    def is_numbered(self) -> bool:
        return not self.rows[0][1]

    def of_images(self, names: Iterable[str]) -> "tuple[dict[str, str], str]":
        """Return the class of each image that has one, and a note on how images and lines were matched.

        A name in the file may be the path of an image below the folder, its file name, or that without the suffix. In a
        file of classes alone, line 1 is of the image whose file name ends in the number 1 (of 0, if there is such an
        image), as in ILSVRC2012_val_00000001.JPEG.

        Raises:
            InputError: An image has no number, or a line that is not there, or two lines name one image differently, or
                one line names several images.
        """
        names = list(names)
        return self._by_number(names) if self.is_numbered else self._by_name(names)

    def _by_number(self, names: Sequence[str]) -> tuple[dict[str, str], str]:
        numbers: dict[int, str] = {}
        for name in names:
            match = _NUMBER_AT_END.search(name.rpartition("/")[2])
            if match is None:
                why = "gives classes by the number at the end of a file name, which this one does not have"
                raise InputError(f"labels: {self.path}: {why}: {name!a}")
            if (other := numbers.setdefault(int(match[1]), name)) != name:
                raise InputError(f"labels: {self.path}: {other!a} and {name!a} have the same number at their end")
        first = 0 if 0 in numbers else 1
        if max(numbers) - first >= len(self.rows):
            count = f"has {len(self.rows)} lines, but {numbers[max(numbers)]!a} has number {max(numbers)}"
            raise InputError(f"labels: {self.path}: {count}")
        how = f"line 1 is of the image with number {first}"
        return {name: self.rows[number - first][2] for number, name in numbers.items()}, how

    def _by_name(self, names: Sequence[str]) -> tuple[dict[str, str], str]:
        known: dict[str, list[str]] = defaultdict(list)
        for name in names:
            file = name.rpartition("/")[2]
            for form in dict.fromkeys((name, file, name.rpartition(".")[0], file.rpartition(".")[0])):
                known[form].append(name)
        found: dict[str, str] = {}
        for line, row, label in self.rows:
            images = known.get(row.replace("\\", "/").removeprefix("./"), [])
            if len(images) > 1:
                raise InputError(
                    f"labels: {self.path}: line {line}: {row!a} may be {images[0]!a} or {images[1]!a}; give the path"
                )
            if images and found.setdefault(images[0], label) != label:
                raise InputError(f"labels: {self.path}: line {line}: {row!a} has another class in an earlier line")
        return found, "by file name"


def read_labels(path: str | Path) -> LabelFile:
    """Read the classes of images.

    Args:
        path: CSV with the columns file and class, in this order or under a header, separated by commas, semicolons,
            tabs or spaces; or one class a line (ILSVRC2012_validation_ground_truth.txt).

    Raises:
        InputError: The file cannot be read, or a line has no class.
    """
    try:
        if not Path(path).is_file():
            raise InputError(f"labels: {path}: there is no such file")
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"labels: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"labels: {path}: is not text in UTF-8 ({error})") from None
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise InputError(f"labels: {path}: is empty; a file and its class a line are expected")
    if len(filled[0].split()) == 1 and not any(delimiter in filled[0] for delimiter in ",;\t"):
        return LabelFile(str(path), list(_classes_alone(path, lines)))
    return LabelFile(str(path), list(_table(path, lines, filled[0])))


def _classes_alone(path: str | Path, lines: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    while not lines[-1].strip():
        lines = lines[:-1]
    for number, line in enumerate(lines, 1):
        if len(line.split()) != 1:
            raise InputError(f"labels: {path}: line {number} is not one class, as line 1 is")
        yield number, "", line.strip()


def _table(path: str | Path, lines: Sequence[str], first: str) -> Iterator[tuple[int, str, str]]:
    delimiter = next((d for d in _DELIMITERS if d in first), ",")
    file_at, class_at = 0, 1
    header: list[str] = []
    try:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not header:
                header = [cell.casefold() for cell in cells]
                file_at, class_at, is_header = _columns(path, reader.line_num, header)
                if is_header:
                    continue
            if len(cells) <= max(file_at, class_at) or not cells[file_at] or not cells[class_at]:
                raise InputError(f"labels: {path}: line {reader.line_num} has no file and class")
            label = cells[class_at]
            if match := _FIRST_OF.match(label):
                label = match[1] or match[2]
            yield reader.line_num, cells[file_at], label
    except csv.Error as error:
        raise InputError(f"labels: {path}: line {reader.line_num}: {error}") from None


def _columns(path: str | Path, line: int, cells: Sequence[str]) -> tuple[int, int, bool]:
    """Return the columns of file and class, and whether the cells are a header."""
    files = [at for at, cell in enumerate(cells) if cell in _FILE]
    classes = [at for at, cell in enumerate(cells) if cell in _CLASS]
    if files and classes:
        return files[0], classes[0], True
    if len(cells) == 2 and (is_image(cells[0]) or not (files or classes)):
        return 0, 1, False
    raise InputError(
        f"labels: {path}: line {line}: columns called file and class are expected, not {', '.join(cells)[:80]!a}"
    )
