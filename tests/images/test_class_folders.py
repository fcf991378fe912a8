"""The classes that names of class folders stand for: numbers, WordNet ids, the model's own labels; never a guess."""

import os
from pathlib import Path

import pytest

import dvit_infer as dvit
from dvit_infer.images.classes import labelled_folder, read_classes
from dvit_infer.images.labelled import labelled_images

pytestmark = pytest.mark.usefixtures("_empty_folder")
WORDNET = [f"n{1000 + 7 * i:08}" for i in range(10)]


def folders(*names: str, empty: tuple[str, ...] = ()) -> None:
    for name in names:
        os.makedirs(f"d/{name}")
        Path(f"d/{name}/a.png").touch()  # is only listed
    for name in empty:
        os.makedirs(f"d/{name}")


def found(num_classes: int = 10, **options) -> dict[str, int]:
    labelled = labelled_images("d", num_classes, **options)
    return {Path(image.path).parent.name: image.label for image in labelled.images()}


def warned(num_classes: int = 10, **options) -> str:
    return "\n".join(labelled_images("d", num_classes, **options).warnings)


def refused(num_classes: int = 10, **options) -> str:
    with pytest.raises(dvit.InputError) as caught:
        labelled_images("d", num_classes, **options)
    return str(caught.value)


def test_numbers_are_classes():
    folders("3", "5", "8")
    assert found() == {"3": 3, "5": 5, "8": 8}
    assert warned() == ""
    assert str(labelled_images("d", 10)) == "3 class folders for 10 classes: their numbers are the classes"
    assert "3 class folders for 6 classes: as numbers they are classes, and 8 is none of" in refused(6)


def test_numbers_are_not_in_the_order_of_text():
    folders(*map(str, range(12)))
    assert found(12) == {str(i): i for i in range(12)}
    assert "torchvision's ImageFolder" in warned(12)
    Path("names.txt").write_text("\n".join(sorted(map(str, range(12)))))  # what the warning says to give
    given = read_classes("names.txt", 12)
    assert (found(12, classes=given)["10"], warned(12, classes=given)) == (2, "")


def test_numbers_that_are_padded_are_in_both_orders():
    folders(*(f"{i:02}" for i in range(12)))
    assert (found(12)["10"], warned(12)) == (10, "")


def test_numbers_from_1():
    folders(*map(str, range(1, 10)))
    assert "no class folder is called 0" in warned(10)
    assert found(9) == {str(i): i - 1 for i in range(1, 10)}
    assert "begin at 1: 9 is taken as class 8" in warned(9)
    folders("10")
    assert "numbers from 1 to 10 may be classes from 1 on, or folders in the order of text" in refused(10)


def test_numbers_of_ilsvrc_need_its_own_list():
    folders(*(f"{i:04}" for i in range(1, 1001)))
    assert "ILSVRC's own" in refused(1000)


def test_a_name_among_numbers_or_wordnet_ids():
    folders("0", "1", "x")
    assert "3 class folders for 3 classes: most are whole numbers, but not 'x'" in refused(3)
    os.rename("d", "numbers")
    folders(*WORDNET[:9], "misc")
    assert "most are WordNet ids, but not 'misc'" in refused(10)


def test_names_that_the_map_lacks_are_counted():
    folders("ant", "bee", "cat")
    Path("names.txt").write_text("ant\ndog")
    given = read_classes("names.txt", 10)
    assert refused(classes=given) == "classes: names.txt: does not name 2 of 3 class folders: 'bee', 'cat'"


def test_placeholders_are_no_labels():
    folders("ant", "bee")
    assert found(2, own={0: "LABEL_0", 1: "LABEL_1"}) == {"ant": 0, "bee": 1}


def test_numbers_that_are_equal():
    folders("1", "01")
    assert "two of them are the same number" in refused()


def test_all_wordnet_ids_are_in_their_order_and_some_are_refused():
    folders(*WORDNET)
    assert found() == {name: index for index, name in enumerate(WORDNET)}
    assert warned() == ""
    assert "10 class folders for 1000 classes: the model's file does not say which" in refused(1000)
    Path("classes.txt").write_text("\n".join(f"{name} thing" for name in ["n00000001", *WORDNET]))
    assert found(11, classes=read_classes("classes.txt", 11))[WORDNET[0]] == 1


def test_the_models_own_labels():
    folders("tench", "great_white_shark")
    own = {0: "goldfish", 4: "great white shark, white shark", 7: "tench"}
    assert found(own=own) == {"tench": 7, "great_white_shark": 4}
    folders("zebra")
    assert "1 not among the model's own labels: 'zebra'" in refused(own=own)


def test_own_labels_do_not_forbid_numbers_or_all_wordnet_ids():
    own = {index: f"thing {index}" for index in range(10)}
    folders("0", "7")
    assert found(own=own) == {"0": 0, "7": 7}
    os.rename("d", "numbers")
    folders(*WORDNET)
    assert found(own=own)[WORDNET[3]] == 3


def test_numbers_beside_a_list_of_names():
    folders("0", "7")
    Path("names.txt").write_text("\n".join(f"thing {index}" for index in range(10)))
    assert found(classes=read_classes("names.txt", 10)) == {"0": 0, "7": 7}


def test_names_that_say_nothing():
    folders("ant", "bee", "cat")
    assert found(3) == {"ant": 0, "bee": 1, "cat": 2}
    assert warned(3) == ""
    assert "3 class folders for 10 classes, taken as classes 0 to 2 in the order of their names" in warned(10)
    assert "3 class folders, but the model has 2 classes" in refused(2)


def test_folders_that_are_none_are_left_out_and_named():
    folders("ant", "bee", ".ipynb_checkpoints", "__MACOSX", "lost+found")
    Path("d/loose.jpg").touch()
    Path("d/Thumbs.db").touch()
    assert found(2) == {"ant": 0, "bee": 1}
    assert "3 folders left out, hidden or left by a tool: '.ipynb_checkpoints', '__MACOSX'" in warned(2)
    assert "1 image left out, in no class folder: 'loose.jpg'" in warned(2)


def test_empty_folders_keep_their_place_only_if_there_is_room():
    folders("ant", "cat", empty=("bee",))
    assert found(3) == {"ant": 0, "cat": 2}
    assert "no image in 1 of 3 class folders: 'bee'" in warned(3)
    assert found(2) == {"ant": 0, "cat": 1}
    Path("map.json").write_text('["cat", "ant"]')
    assert found(2, classes=read_classes("map.json", 2)) == {"ant": 1, "cat": 0}


def test_training_takes_numbers_in_their_order():
    folders(*map(str, range(12)))
    assert labelled_folder("d", 12).labels == {str(i): i for i in range(12)}
