"""--classes as text: names, numbers and names, ILSVRC's files; the line that is wrong is named."""

from pathlib import Path

import pytest

import dvit_infer as dvit
from dvit_infer.images.classes import read_classes

pytestmark = pytest.mark.usefixtures("_empty_folder")
DIGITS = ["zero", "one", "two"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("zero\none\ntwo\n", DIGITS),
        ("\ufeffzero\r\none\r\ntwo\r\n\r\n", DIGITS),  # of Windows
        ("0 zero\n1 one\n2 two", DIGITS),
        ("2,two\n0,zero\n1,one\n", DIGITS),
        ("0: zero\n1: one\n2: two", DIGITS),
        ("index,name\n0,zero\n1,one\n2,two", DIGITS),
        ("zero 0\none 1\ntwo 2", DIGITS),
        ('0,"zero, nil"\n1,one\n2,two', ["zero, nil", "one", "two"]),
        ("great white shark 2\ntench 0\ngoldfish 1", ["tench", "goldfish", "great white shark"]),
        ("tench, Tinca tinca\ngoldfish\nshark", ["tench, Tinca tinca", "goldfish", "shark"]),
        ("n01440764 tench, Tinca\nn01443537 goldfish\nn01484850 shark", ["tench, Tinca", "goldfish", "shark"]),
        ("0\n10\n2", ["0", "10", "2"]),  # folders in some order, not numbers of classes
        ('["zero", "one", "two"]', DIGITS),  # JSON, whatever the file is called
        ('{"0": ["n1", "zero"], "1": ["n2", "one"], "2": ["n3", "two"]}', DIGITS),
    ],
)  # fmt: skip
def test_lists(text, labels):
    Path("c.txt").write_bytes(text.encode())
    assert read_classes("c.txt", 3).labels == dict(enumerate(labels))


def test_wordnet_ids_and_names_are_both_folders():
    Path("synset_words.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    found = read_classes("synset_words.txt", 2)
    assert [found.of_folder(name) for name in ("n01443537", "tench", "Goldfish", "tench, Tinca tinca")] == [1, 0, 1, 0]


def test_ilsvrcs_numbers_are_not_the_classes():
    Path("map_clsloc.txt").write_text("n02119789 1 kit_fox\nn02100735 2 English_setter\nn01440764 3 tench\n")
    found = read_classes("map_clsloc.txt", 3)
    assert found.labels == {0: "tench", 1: "English_setter", 2: "kit_fox"}  # the ids, sorted
    assert found.numbers == {1: 2, 2: 1, 3: 0}
    assert found.of_folder("n02100735") == 1
    with pytest.raises(dvit.InputError, match="has 3 of ILSVRC's ids, but the model has 1000 classes"):
        read_classes("map_clsloc.txt", 1000)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "line 1 is empty"),
        ("zero\n\ntwo", "line 2 is empty"),
        ("zero\none\ntwo\nthree", "line 4 is class 3, but the model has classes 0 to 2"),
        ("0 zero\none\n2 two", "line 2 is not a class and its name"),
        ("0 zero\n0 one\n2 two", "line 2 is class 0, as 'zero' is"),
        ("1 zero\n2 one\n3 two", "line 3 is class 3, but .* these begin at 1"),
        ("name,index\nzero,0\none,7", "line 3 is class 7"),
        ("\0\1\2", "line 1 is no text"),
        ("\xff", "not text in UTF-8"),
        ("{", "is not JSON"),
    ],
)
def test_lists_that_cannot_be_used(text, why):
    Path("c.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(dvit.InputError, match=rf"^classes: c\.txt: {'is ' if why.startswith('not') else ''}{why}"):
        read_classes("c.txt", 3)
