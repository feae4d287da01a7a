"""Pictures of evidence: what is drawn where, and that what is shown adds up."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_evidence import CLASSES, PEAK, Sources, album, evidence, explanation, half_and_half
from PIL import Image

from protopnet.errors import UserError
from protopnet.evidence.figures import Album, class_figure, page, shown_points
from protopnet.pages import pictures
from protopnet.words import find_class, readable_names


def test_heat_is_where_the_map_is_and_see_through_elsewhere():
    heat = np.asarray(pictures.heat(PEAK, 80, 60)).astype(int)
    assert heat.shape == (60, 80, 4)
    assert heat[0, -1, 3] > 150
    assert heat[-1, 0, 3] < 30
    brightness = heat[..., :3].sum(-1)
    assert brightness[0, -1] > brightness[-1, 0] + 300  # to be told apart without colour
    flat = np.asarray(pictures.heat([[0.3, 0.3]], 10, 10))
    assert flat[..., 3].max() == 0


def test_a_box_is_drawn_on_its_edge_and_nowhere_else():
    before = Image.new("RGB", (120, 90), (90, 90, 90))
    after = np.asarray(pictures.with_box(before, (20, 30, 60, 100)))
    changed = np.argwhere((after != np.asarray(before)).any(-1))
    assert changed.min(0).tolist() == [20, 30]
    assert changed.max(0).tolist() == [59, 99]
    assert (after[40, 65] == 90).all()


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.data(),
)
def test_a_moved_box_lies_on_the_copy_and_is_not_empty(size, to, data):
    width, height = size
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    new_top, new_left, new_bottom, new_right = pictures.moved((top, left, bottom, right), size, to)
    assert 0 <= new_top < new_bottom <= to[1]
    assert 0 <= new_left < new_right <= to[0]
    assert pictures.moved((top, left, bottom, right), size, size) == (top, left, bottom, right)


def test_the_prototype_is_cut_out_of_its_training_image():
    """Its box is the left half of the source, which is red."""
    image, box = album().training_image(evidence(1.0))
    assert box == (0, 0, 50, 100)
    patch = np.asarray(pictures.crop(image, box)).astype(int)
    assert (patch[..., 0] > 150).all()
    assert (patch[..., 2] < 90).all()


@given(st.lists(st.floats(-50, 50), max_size=12), st.floats(-500, 500))
def test_what_is_shown_adds_up(listed, rest):
    points, remainder, total = shown_points(explanation(listed, rest).top)
    in_cents = [round(100 * float(text)) for text in (*points, remainder)]
    assert sum(in_cents) == round(100 * float(total))
    assert abs(float(remainder) - rest) <= 0.005 * (len(listed) + 2)


def test_a_figure_has_a_row_a_prototype():
    one = class_figure(half_and_half(120, 90), explanation([4.0], 1.0).top, album(), readable_names(CLASSES))
    three = class_figure(half_and_half(120, 90), explanation([4.0, 3.0, 2.0], 1).top, album(), readable_names(CLASSES))
    assert one.width == three.width > 1200
    assert three.height - one.height == pytest.approx(2 * 1.32 * 150, abs=2)
    assert (np.asarray(one)[:5] == 255).all()  # nothing runs over the edge
    pixels = np.asarray(three).reshape(-1, 3).astype(int)
    assert ((pixels[:, 0] > 200) & (pixels[:, 1] < 60)).sum() > 5000  # the red half of photo and prototype


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(" ".join(data.split()))


def test_the_page_needs_nothing_else_and_says_all_numbers():
    document = page([("a bird.jpg", half_and_half(120, 90), explanation([4.126, 3.0], 1.0, label=2))], album(), "Why?")
    read = Page(document)
    assert all(source.startswith(("data:image/", "#")) for source in read.sources)
    assert not re.search(r"url\((?!data:)", document)
    assert "b" not in read.tags  # a class name isn't markup
    said = [word for word in read.words if word]
    assert "Why <b>Crow</b>?" in said
    for text in ("4.13", "3.00", "1.00", "8.13", "7 other prototypes together", "a bird.jpg"):
        assert text in said
    for source in read.sources:
        if source.startswith("data:"):
            Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).load()


def test_without_thumbnails_there_is_a_sentence_instead_of_a_figure():
    bare = Album(Sources(None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no picture of prototype 0.*thumbnails"):
        class_figure(half_and_half(), explanation([1.0], 0).top, bare, CLASSES)
    with pytest.raises(UserError, match="--pictures none"):
        page([("a", half_and_half(), explanation([1.0], 0))], bare, "Why?")


@pytest.mark.parametrize("text", ["002.House_Wren", "house wren", "House_Wren", "HOUSE WREN", "1"])
def test_a_class_is_found_as_people_name_it(text):
    assert find_class(text, CLASSES) == 1


def test_a_class_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no class 'hose ren' among the 3 .* did you mean 002.House_Wren"):
        find_class("hose ren", CLASSES)
    with pytest.raises(UserError, match="no class '3'"):
        find_class("3", CLASSES)
