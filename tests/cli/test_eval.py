"""dvit-eval: its numbers are those of a plain loop; class maps; folders that cannot be evaluated."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import SIZE, TINY, fails
from drawn import SMALL, draw_all, write_cut, write_text
from golden_cases import state_dict

import dvit_infer as dvit
from dvit_infer.cli import eval as command
from dvit_infer.cli.counting import counting
from dvit_infer.evaluate.accuracy import measure_accuracy, reference_of
from dvit_infer.images.classes import labelled_folder, read_classes
from dvit_infer.images.decode import open_image
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.tensors import normalise

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]


@pytest.fixture(scope="module")
def image_folder(checkpoint, tmp_path_factory):
    """Images with the reference's logits (12, 10)."""
    paths = draw_all(tmp_path_factory.mktemp("drawn"), 12)
    return paths, answers(dvit.load_reference(checkpoint, **SIZE), paths)


def answers(model, paths) -> torch.Tensor:
    crop = Preprocess((64, 64), 0.875)
    with torch.no_grad():
        images = torch.stack([torch.from_numpy(crop(open_image(path))) for path in paths])
        return model(normalise(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def sorted_into_folders(paths, labels, root="photos") -> None:
    for path, label in zip(paths, labels.tolist(), strict=True):
        folder = Path(root, f"c{label}", "deeper" if label % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)


def class_map() -> list[str]:
    Path("map.json").write_text(json.dumps({f"c{index}": index for index in range(10)}))
    return ["--classes", "map.json"]


def test_numbers_are_those_of_a_plain_loop(image_folder, checkpoint, capsys):
    paths, logits = image_folder
    order = logits.argsort(dim=1, descending=True)
    labels = torch.tensor([row[(0, 3, 7)[at % 3]] for at, row in enumerate(order.tolist())])  # right, in five, outside
    sorted_into_folders(paths, labels)
    argv = [
        str(checkpoint),
        "photos",
        *OPTIONS,
        *class_map(),
        "--batch",
        "7",
        "--against-reference",
        "--json",
        "e.json",
    ]
    assert command.main(argv) == 0
    out = capsys.readouterr()
    assert out.err == ""
    row = json.loads(Path("e.json").read_text())["rows"][0]
    assert json.loads(Path("e.json").read_text())["environment"]["torch"] == torch.__version__
    assert (row["images"], row["top1"], row["unreadable"]) == (12, pytest.approx(100 / 3), [])
    assert row["top5"] == pytest.approx(200 / 3)
    assert row["reference_top1"] == pytest.approx(100 / 3)
    assert (row["top1_agreement"], row["confusion"]) == (1.0, [[4, 0], [0, 8]])
    assert (row["runtime"], row["batch"], row["device"], row["dtype"]) == ("engine", 7, "cpu", "float32")
    assert row["model"] == dvit.convert(checkpoint, device="cpu", **SIZE).config.arch
    assert min(row[name] for name in ("decode_images_per_s", "model_images_per_s")) > 0
    assert row["images_per_s"] is None  # beside the reference it would be that of decoding ahead
    assert "33.33%" in out.out
    assert "by map.json" in out.out


def test_confusion_with_a_reference_that_differs(image_folder, checkpoint):
    paths, logits = image_folder
    other = dvit.load_reference({"model": state_dict("tiny-deit", 2)}, **SIZE)
    ours, theirs = logits.argmax(dim=1), answers(other, paths).argmax(dim=1)
    labels = torch.where(torch.arange(12) % 2 == 0, ours, theirs)
    labels[0] = next(c for c in range(10) if c not in (ours[0], theirs[0]))
    sorted_into_folders(paths, labels)
    class_map()
    engine = dvit.convert(checkpoint, device="cpu", **SIZE)
    folder = labelled_folder("photos", 10, read_classes("map.json", 10))
    found = measure_accuracy(engine, folder, batch=5, workers=2, reference=other)
    correct, also = ours == labels, theirs == labels
    expected = [[correct & also, correct & ~also], [~correct & also, ~correct & ~also]]
    assert found.confusion == tuple(tuple(int(side.sum()) for side in sides) for sides in expected)
    assert min(found.confusion[0][1], *found.confusion[1]) > 0  # the test has cases of each kind of difference
    assert found.agreement == pytest.approx((ours == theirs).float().mean().item())
    assert found.reference_top1 == pytest.approx(100 * also.float().mean().item())
    assert found.workers == 2


def test_dense_saved_files_and_crops(image_folder, checkpoint, capsys):
    paths, _ = image_folder
    sorted_into_folders(paths, torch.arange(12) % 3)
    engine = dvit.convert(checkpoint, device="cpu", method="none", **SIZE)
    engine.save("dense.safetensors")
    argv = [
        "dense.safetensors",
        "photos",
        "--device",
        "cpu",
        "--workers",
        "1",
        "--against-reference",
        "--json",
        "d.json",
    ]
    assert command.main([*argv, "--crop-pct", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "3 class folders for 10 classes: taken as classes 0 to 2, in the folders' order" in out
    assert "64x64, crop 0.5" in out
    row = json.loads(Path("d.json").read_text())["rows"][0]
    assert (row["runtime"], row["keep_rate"], row["top1_agreement"]) == ("dense", 1.0, 1.0)
    model = reference_of(engine, checkpoint)
    assert not model(torch.zeros(1, 3, 64, 64), return_kept=True)[1]


def test_images_that_cannot_be_read_are_counted_and_named(checkpoint, capsys):
    draw_all(Path("photos/a"), 9)
    write_text(Path("photos/b/text.jpg"))
    write_cut(Path("photos/b/cut.jpg"))
    draw_all(Path("photos/b"), 1)
    assert command.main([str(checkpoint), "photos", *OPTIONS, "--json", "u.json"]) == 1
    out = capsys.readouterr()
    warning, error = out.err.splitlines()
    assert warning.startswith("warning: photos: 2 class folders for 10 classes, taken as classes 0 to 1")
    assert error == "error: photos: 2 of 12 images cannot be read, more than 1%"
    assert "cannot be read: photos/b/cut.jpg: damaged: " in out.out
    row = json.loads(Path("u.json").read_text())["rows"][0]
    assert row["images"] == 10
    assert [bad["image"] for bad in row["unreadable"]] == ["photos/b/cut.jpg", "photos/b/text.jpg"]
    shutil.rmtree("photos/a")
    Path("photos/b/000.png").unlink()
    assert command.main([str(checkpoint), "photos", *OPTIONS, "--json", "u.json"]) == 1
    assert json.loads(Path("u.json").read_text())["rows"][0]["top1"] is None


def test_one_in_a_hundred_may_be_unreadable(checkpoint, capsys):
    (path,) = draw_all(Path("photos/a"), 1)
    for number in range(98):
        os.link(path, f"photos/a/copy{number}.png")
    write_text(Path("photos/a/text.jpg"))
    assert command.main([str(checkpoint), "photos", *OPTIONS, "--image-size", "32"]) == 0
    write_text(Path("photos/a/text2.jpg"))
    assert command.main([str(checkpoint), "photos", *OPTIONS, "--image-size", "32"]) == 1


def test_only_ten_unreadable_ones_are_printed_and_their_names_are_harmless(checkpoint, capsys):
    draw_all(Path("photos/a"), 1)
    for number in range(12):
        write_text(Path(f"photos/a/t{number:02}\x1b[31m{os.fsdecode(bytes([255]))}.jpg"))
    assert command.main([str(checkpoint), "photos", *OPTIONS, "--json", "u.json"]) == 1
    out = capsys.readouterr().out
    assert out.count("cannot be read: photos/a/t") == 10
    assert "cannot be read: 2 more" in out
    assert "\x1b" not in out
    names = [bad["image"] for bad in json.loads(Path("u.json").read_text())["rows"][0]["unreadable"]]
    assert all(os.path.exists(name) for name in names)
    assert len(names) == 12


def test_answers_that_are_not_finite_are_wrong(image_folder, checkpoint):
    paths, logits = image_folder
    sorted_into_folders(paths, logits.argmax(dim=1))
    class_map()
    engine = dvit.convert(checkpoint, device="cpu", backend="torch", **SIZE)
    engine.graph.nodes[-1].weights["head.bias"].fill_(float("nan"))
    found = measure_accuracy(engine, labelled_folder("photos", 10, read_classes("map.json", 10)), workers=0)
    assert (found.images, found.not_finite, found.top1, found.top5) == (12, 12, 0.0, 0.0)
    assert "NaN or Inf" in str(found)


def test_folders_that_cannot_be_evaluated(checkpoint, capsys):
    os.mkdir("empty")
    draw_all(Path("flat"), 1)
    os.makedirs("hollow/a")
    for number in range(11):
        draw_all(Path(f"many/{number}"), 1)
    Path("file.txt").touch()
    for folder, why in {
        "empty": "class folders", "flat": "class folders", "hollow": "no image", "many": "11 class folders",
        "none": "no such folder", "file.txt": "not a folder",
    }.items():  # fmt: skip
        line = fails(command, [checkpoint, folder, *OPTIONS], capsys)
        assert line.startswith(f"error: {folder}: ")
        assert why in line


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch", "0"], "--batch"),
        (["--batch", "-3"], "--batch"),
        (["--batch", "x"], "--batch"),
        (["--batch", "99999999999"], "--batch"),
        (["--workers", "-1"], "--workers"),
        (["--workers", "9999"], "--workers"),
        (["--crop-pct", "0"], "--crop-pct"),
        (["--crop-pct", "nan"], "--crop-pct"),
        (["--classes", "none.json"], "--classes: none.json"),
        (["--classes", "."], "--classes: ."),
        (["--json", "nowhere/x.json"], "--json"),
        (["--keep-rate", "2"], "--keep-rate"),
        (["--method", "magic"], "--method"),
        (["--image-size", "65"], "--image-size"),
        (["--dtype", "int4"], "--dtype"),
    ],
)
def test_bad_options(argv, named, checkpoint, capsys):
    draw_all(Path("photos/a"), 1)
    assert named in fails(command, [checkpoint, "photos", *OPTIONS, *argv], capsys)


def test_a_batch_that_does_not_fit(checkpoint, capsys, monkeypatch):
    draw_all(Path("photos/0"), 1)

    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("dvit_infer.engine.Engine.__call__", no_memory)
    assert "--batch: 5 images do not fit" in fails(command, [checkpoint, "photos", *OPTIONS, "--batch", "5"], capsys)


@pytest.mark.parametrize(
    ("content", "labels", "folders"),
    [
        (["tench", "shark"], {0: "tench", 1: "shark"}, {"tench": 0, "shark": 1}),
        ({"n2": 7, "n1": 0}, {7: "n2", 0: "n1"}, {"n2": 7, "n1": 0}),
        ({"0": ["n1", "tench"], "9": ["n2", "shark"]}, {0: "tench", 9: "shark"}, {"n1": 0, "n2": 9, "shark": 9}),
        ({"3": "tench"}, {3: "tench"}, {"tench": 3}),
    ],
)
def test_class_maps(content, labels, folders):
    Path("m.json").write_text(json.dumps(content))
    found = read_classes("m.json", 10)
    assert found.labels == labels
    assert {name: found.of_folder(name) for name in folders} == folders
    with pytest.raises(dvit.InputError, match=r"classes: m\.json: does not name .*'n77'"):
        found.of_folder("n77")


def test_a_name_of_two_classes_is_a_label_but_no_folders():
    Path("m.json").write_text(json.dumps(["crane", "x", "crane"]))
    found = read_classes("m.json", 10)
    assert found.labels[2] == "crane"
    with pytest.raises(dvit.InputError, match=r"classes: m\.json: 'crane' .* 0 and 2"):
        found.of_folder("crane")


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "list"),
        ("{}", "list"),
        ('{"a": 10}', "'a'"),
        ('{"a": -1}', "'a'"),
        ('{"a": 1, "b": 1}', "'b'"),
        ('{"a": 1, "a": 2}', "'a'"),
        ('{"a": 1.5}', "'a'"),
        ('{"a": true}', "'a'"),
        ('{"0": "x", "00": "y"}', "'00'"),
        ('{"0": 3, "x": "y"}', "'0'"),
        ('{"0": ["n1", 3]}', "'0'"),
        ('{"0": []}', "'0'"),
        ("[1, 2]", "'0'"),
        (json.dumps([str(number) for number in range(11)]), "'10'"),
        ("\xff", "not JSON"),
    ],
)
def test_class_maps_that_cannot_be_used(text, entry):
    Path("m.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(dvit.InputError) as caught:
        read_classes("m.json", 10)
    assert str(caught.value).startswith("classes: m.json: ")
    assert entry in str(caught.value)


def test_a_folder_that_the_map_does_not_name(checkpoint, capsys):
    draw_all(Path("photos/zebra"), 1)
    line = fails(command, [checkpoint, "photos", *OPTIONS, *class_map()], capsys)
    assert line.startswith("error: --classes: map.json: ")
    assert "zebra" in line


def test_counting_shows_nothing_where_there_is_no_terminal(capsys):
    with counting("x", lambda: pytest.fail("counted for nothing")) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_counting_on_a_terminal_leaves_stdout_alone(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with counting("images", lambda: 40) as advance:
        advance(10)
        print("a line")
    assert "10/40" in terminal.getvalue()
    assert capsys.readouterr().out == "a line\n"
