"""`make demo`: its drawing has several images, and what it made is named."""

import re
from fnmatch import fnmatch

from commands import ROOT


def test_the_drawing_of_the_demo_has_three_images():
    """pictures.py names the images of a test set by their number, in a folder for each of the ten classes."""
    pattern = re.search(r"dvit-viz \S+ build/demo/pictures/(\S+)", (ROOT / "Makefile").read_text())[1]
    for first in range(10):  # whatever their classes are
        written = [f"{(first + 7 * at) % 10}/{at:05}.png" for at in range(1000)]
        assert sum(fnmatch(name, pattern) for name in written) == 3


def test_the_demo_ends_by_naming_what_there_is_to_look_at():
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    named = re.findall(r"file://\$\(CURDIR\)/(\S+)'", recipe)
    assert named == re.findall(r"(?:--report|-o) (\S+\.(?:html|png))$", recipe, re.MULTILINE)
    assert len(named) == 2
