"""Pictures of evidence: what is drawn where, and that what is shown adds up."""

import base64
import io
import re
from decimal import ROUND_HALF_UP, Decimal
from html.parser import HTMLParser

import numpy as np
import pytest
from browsing import number
from hypothesis import given
from hypothesis import strategies as st
from made_evidence import CLASSES, PEAK, Sources, album, contrast, evidence, explanation, half_and_half
from PIL import Image

from protopnet.errors import UserError
from protopnet.evidence.figures import Album, class_figure, page
from protopnet.evidence.sums import contrast_sums_of, sums_of
from protopnet.pages import pictures
from protopnet.words import find_class, probability_text, readable_names


def test_heat_is_where_the_map_is_and_see_through_elsewhere():
    heat = np.asarray(pictures.heat(PEAK, 80, 60)).astype(int)
    assert heat.shape == (60, 80, 4)
    assert heat[0, -1, 3] > 150
    assert heat[-1, 0, 3] < 30
    brightness = heat[..., :3].sum(-1)
    assert brightness[0, -1] > brightness[-1, 0] + 300  # to be told apart without colour
    flat = np.asarray(pictures.heat([[0.3, 0.3]], 10, 10))
    assert flat[..., 3].max() == 0


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.data(),
)
def test_a_crop_of_a_copy_is_never_empty(size, to, data):
    width, height = size
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    image = Image.new("RGB", to)
    assert min(pictures.crop(image, (top, left, bottom, right), size).size) > 0
    assert pictures.crop(image, (0, 0, height, width), size).size == to


def test_the_prototype_is_cut_out_of_its_training_image():
    """Its box is the left half of the source, which is red."""
    jpeg, source = album().source(evidence(1.0))
    patch = pictures.crop(pictures.opened(jpeg), (0, 0, 200, 200), (source.width, source.height))
    assert patch.size == (100, 100)
    colours = np.asarray(patch).astype(int)
    assert (colours[:, :95, 0] > 150).all()
    assert (colours[:, :95, 2] < 90).all()


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-20, 20)), max_size=12), st.floats(-500, 500), st.integers(0, 9))
def test_what_is_shown_adds_up_for_whoever_has_a_calculator(listed, rest, remaining):
    logit = sum(s * c for s, c in listed) + rest * bool(remaining)
    shown = sums_of(listed, logit, 0.5, remaining=remaining)
    total, remainder = number(shown.total), number(shown.remainder)
    for row, (similarity, connection) in zip(shown.rows, listed, strict=True):
        product = number(row.similarity) * number(row.connection)
        assert product.quantize(Decimal("0.01"), ROUND_HALF_UP) == number(row.points)
        assert abs(number(row.points) - Decimal(similarity * connection)) < Decimal("0.03")
    assert sum(number(row.points) for row in shown.rows) + remainder == total
    assert abs(total - Decimal(logit)) <= Decimal("0.00501") if remaining else remainder == 0


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(-20, 20), st.floats(-20, 20)), max_size=12),
    st.floats(-500, 500),
    st.floats(-500, 500),
    st.integers(0, 9),
)
def test_shown_differences_add_up_to_that_of_the_totals_shown(listed, rest, rival_rest, remaining):
    logit, rival = (
        sum(row[0] * row[n] for row in listed) + r * bool(remaining) for n, r in ((1, rest), (2, rival_rest))
    )
    shown = contrast_sums_of(listed, logit, rival, remaining=remaining)
    for row in shown.rows:
        assert number(row.points) - number(row.rival_points) == number(row.difference)
    assert sum(number(row.difference) for row in shown.rows) + number(shown.remainder) == number(shown.total)
    totals = [number(sums_of([(s, pair[n]) for s, *pair in listed], total, 0.5, remaining=remaining).total)
              for n, total in ((0, logit), (1, rival))]  # fmt: skip
    assert number(shown.total) == totals[0] - totals[1]


def test_this_and_not_that_is_drawn_and_written():
    found = contrast([(4.0, -1.0), (0.0, 3.0)], 0.25, rival=2)
    drawn = class_figure(half_and_half(120, 90), found, album(), readable_names(CLASSES))
    assert drawn.height == class_figure(half_and_half(), explanation([1, 1], 0).top, album(), CLASSES).height
    assert (np.asarray(drawn)[:5] == 255).all()
    both = explanation([4.0], 1.0).model_copy(update={"contrasts": [found]})
    said = " ".join(Page(page([("a bird.jpg", half_and_half(120, 90), both)], album(), "Why?")).words)
    for text in ("Why Blue Jay and not <b>Crow</b>?", "points for Blue Jay", "points for <b>Crow</b>",
                 "0.500 2.00 −0.50 2.50", "0.500 0.00 1.50 −1.50", "7 other prototypes together 0.25",
                 "Blue Jay more than <b>Crow</b> 1.25"):  # fmt: skip
        assert text in " ".join(said.split()), text


def test_a_probability_is_never_rounded_to_certainty():
    shown = [probability_text(share) for share in (0.99951, 0.9994, 0.5, 0.0006, 0.0004)]
    assert shown == ["> 99.9 %", "99.9 %", "50.0 %", "0.1 %", "< 0.1 %"]


def test_a_figure_has_a_row_a_prototype():
    one = class_figure(half_and_half(120, 90), explanation([4.0], 1.0).top, album(), readable_names(CLASSES))
    three = class_figure(half_and_half(120, 90), explanation([4.0, 3.0, 2.0], 1).top, album(), readable_names(CLASSES))
    assert one.width == three.width > 1200
    assert three.height - one.height == pytest.approx(2 * 1.32 * 150, abs=2)
    assert (np.asarray(one)[:5] == 255).all()  # nothing runs over the edge
    pixels = np.asarray(three).reshape(-1, 3).astype(int)
    assert ((pixels[:, 0] > 200) & (pixels[:, 1] < 60)).sum() > 5000  # the red half of photo and prototype


@pytest.mark.parametrize("name", ["$5 and $6", r"$\frac{$", "a_{b", r"\alpha $x", "50 % of $x$"])
def test_a_class_name_is_no_formula(name):
    names = [name, "a", "b"]
    plain = class_figure(half_and_half(), explanation([1.0], 1.0).top, album(), names)
    other = class_figure(half_and_half(), explanation([1.0], 1.0).top, album(), [name.replace("$", "S"), "a", "b"])
    assert plain.size == other.size
    if "$" in name:
        assert (np.asarray(plain) != np.asarray(other)).any()


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


def test_a_prototype_that_people_have_named_is_shown_by_name():
    plain = explanation([4.126, 3.0], 1.0)
    (entry,) = plain.classes
    first = entry.evidence[0].model_copy(update={"name": "red <bill>"})
    named = plain.model_copy(update={"classes": [entry.model_copy(update={"evidence": [first, entry.evidence[1]]})]})
    document = page([("a bird.jpg", half_and_half(120, 90), named)], album(), "Why?")
    assert document.count("<b>red &lt;bill&gt;</b>") == 1
    assert "training image of red &lt;bill&gt; (prototype 0) of" in document
    drawn, without = (class_figure(half_and_half(), each.top, album(), CLASSES) for each in (named, plain))
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(without)).max() > 50


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
