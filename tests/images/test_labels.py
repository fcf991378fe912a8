"""--labels: the classes of images that lie in no class folders, by CSV or ILSVRC's ground truth."""

import tarfile
from pathlib import Path

import pytest
from drawn import draw_all

import dvit_infer as dvit
from dvit_infer.images.classes import read_classes
from dvit_infer.images.labelled import labelled_images

pytestmark = pytest.mark.usefixtures("_empty_folder")
NAMES = ["000.png", "001.jpg", "002.webp"]


@pytest.fixture(autouse=True)
def _images(_empty_folder):
    draw_all(Path("d"), 3)


def found(text: str, where: str = "d", num_classes: int = 10, **options):
    Path("l.csv").write_bytes(text.encode())
    return labelled_images(where, num_classes, labels="l.csv", **options)


def classes(*arguments, **options) -> list[int]:
    return [image.label for image in found(*arguments, **options).images()]


def refused(*arguments, **options) -> str:
    with pytest.raises(dvit.InputError) as caught:
        found(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "000.png,4\n001.jpg,0\n002.webp,9\n",
        "\ufefffile;label\r\n000.png;4\r\n001.jpg;0\r\n002.webp;9\r\n",
        "000.png 4\n001.jpg 0\n002.webp 9",
        "image_id\tsplit\tclass_id\n002\tval\t9\n001\tval\t0\n000\tval\t4\n",
        '"filename","note","target"\n"other.png","a, b","1"\n"./000.png","",4\n001.jpg,,0\n002.webp,,9\n',
        "file,class\n000.png,4.0\n001.jpg,0.0\n002.webp,9.0",
        "4\n0\n9\n",
    ],
)
def test_forms(text):
    assert classes(text) == [4, 0, 9]


def test_what_is_said():
    labelled = found("file,class\n000.png,4\n002.webp,4\nother.png,3\n")
    assert [(image.path, image.label) for image in labelled.images()] == [("d/000.png", 4), ("d/002.webp", 4)]
    assert str(labelled) == "1 class for 10 classes: by file name, in l.csv: their numbers are the classes"
    left_out, unused = labelled.warnings
    assert left_out == "d: 1 image left out, not in l.csv: '001.jpg'"
    assert unused == "l.csv: 1 line of 3 without an image in d"


def test_names_of_classes():
    text = "000.png,cat\n001.jpg,ant\n002.webp,cat"
    assert classes(text, num_classes=2) == [1, 0, 1]
    assert "2 classes for 10 classes, taken as classes 0 to 1" in found(text).warnings[0]
    Path("names.txt").write_text("cat\nant")
    assert classes(text, num_classes=2, classes=read_classes("names.txt", 2)) == [0, 1, 0]
    assert classes(text, own={3: "ant", 5: "cat"}) == [5, 3, 5]
    assert "1 not among the model's own labels: 'cat'" in refused(text, own={3: "ant"})


def test_numbers_from_1():
    assert classes("000.png,3\n001.jpg,1\n002.webp,2", num_classes=3) == [2, 0, 1]
    assert "begin at 1" in found("000.png,3\n001.jpg,1\n002.webp,2", num_classes=3).warnings[0]
    assert "4 is none of the classes 0 to 3" in refused("000.png,4\n001.jpg,1\n002.webp,2", num_classes=4)


def ilsvrc() -> None:
    Path("v").mkdir()
    for number, path in enumerate(sorted(Path("d").iterdir()), 1):
        path.rename(f"v/ILSVRC2012_val_{number:08}{path.suffix}")


def test_ground_truth_goes_by_the_number_of_the_file():
    ilsvrc()
    Path("v/ILSVRC2012_val_00000002.jpg").unlink()
    labelled = found("2\n0\n1\n1\n", "v")
    assert [image.label for image in labelled.images()] == [2, 1]
    assert str(labelled).startswith("2 classes for 10 classes: line 1 is of the image with number 1, in l.csv")
    assert "2 lines of 4 without an image" in labelled.warnings[-1]


def test_ground_truth_with_ilsvrcs_own_numbers():
    ilsvrc()
    Path("map_clsloc.txt").write_text("n02119789 1 kit_fox\nn02100735 2 English_setter\nn01440764 3 tench\n")
    given = read_classes("map_clsloc.txt", 3)
    assert classes("2\n3\n1\n", "v", num_classes=3, classes=given) == [1, 0, 2]
    assert "if the numbers are ILSVRC's own" in found("2\n3\n1\n", "v", num_classes=1000).warnings[0]
    assert classes("n02119789\nn01440764\nn01440764", "v", num_classes=3, classes=given) == [2, 0, 0]


def test_kaggles_solution_of_ilsvrc():
    ilsvrc()
    text = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{number:08},{name} 85 1 499 272 {name} 1 1 2 2\n"
        for number, name in ((3, "n02119789"), (1, "n01440764"), (2, "n02100735"))
    )
    assert classes(text, "v", num_classes=3) == [0, 1, 2]


def test_images_in_an_archive():
    with tarfile.open("a.tar", "w") as tar:
        tar.add("d")
    assert classes("000.png,4\n001.jpg,0\nd/002.webp,9\n", "a.tar") == [4, 0, 9]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("a,b,c\n1,2,3\n", "line 1: columns called file and class"),
        ("000.png,4\n001.jpg\n", "line 2 has no file and class"),
        ("000.png,4\n000.png,5\n", "line 2: '000.png' has another class"),
        ("4\n0\n9 9\n", "line 3 is not one class"),
        ("4\n0\n", "has 2 lines, but '002.webp' has number 2"),
        ("x.png,1\ny.png,2", "names none of the 3 images in d"),
        ("000.png,77", "77 is none of the classes 0 to 9"),
        ("\xff", None),
    ],
)
def test_files_that_cannot_be_used(text, why):
    message = refused(text)
    assert message.startswith("labels: l.csv: ")
    assert why is None or why in message


def test_names_that_may_be_two_images():
    draw_all(Path("d/e"), 1)
    assert "line 1: '000.png' may be" in refused("000.png,1")
    assert classes("d/e/000.png,1\ne/000.png,2") == [2]


def test_folders_that_are_not_there():
    assert refused("a.png,1", "nowhere").startswith("nowhere: ")
    Path("empty").mkdir()
    assert refused("a.png,1", "empty").startswith("empty: no image")
    with pytest.raises(dvit.InputError, match=r"^labels: none\.csv: there is no such file"):
        labelled_images("d", 10, labels="none.csv")


def test_a_flat_folder_names_the_option():
    Path("d/labels.csv").write_text("000.png,1")
    with pytest.raises(dvit.InputError, match=r"no class folders.*--labels d/labels\.csv"):
        labelled_images("d", 10)
