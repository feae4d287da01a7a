"""The report: everything in one file, for every kind of run, with nothing a name could break."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from made_evidence import CLASSES as MADE_CLASSES
from made_evidence import album, explanation, half_and_half
from PIL import Image

from protopnet.config import RunSettings
from protopnet.evidence.figures import explained_image
from protopnet.model.bundle import PROTOTYPE_SCHEMA
from protopnet.pages import charts
from protopnet.quality.table import quality_table
from protopnet.training.examples import choose_examples
from protopnet.training.report import RunReport, StageReport, most_confused, write_report
from protopnet.words import duration, flatten, readable_names

TERMS = ("total", "cross_entropy", "cluster", "separation", "l1", "accuracy", "validation_accuracy")


def jpeg(width: int = 120, height: int = 80) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), "seagreen").save(sink, "JPEG")
    return sink.getvalue()


def prototypes(classes: list[str], each: int = 2) -> pa.Table:
    peak = np.zeros((7, 7))
    peak[1, 5] = 9.0  # top right
    rows = [
        {
            "prototype": label * each + number,
            "class": label,
            "class_name": name,
            "image_id": label,
            "uri": f"s3://bucket/{name}/{number}.jpg",
            "sha256": "",
            "width": 120,
            "height": 80,
            "row": 1,
            "column": 5,
            "box": [5, 85, 30, 120],
            "receptive_field": [0, 0, 1, 1],
            "self_similarity": 9.0,
            "activation_map": peak.tolist(),
            "thumbnail": jpeg(),
        }
        for label, name in enumerate(classes)
        for number in range(each)
    ]
    return pa.Table.from_pylist(rows, PROTOTYPE_SCHEMA)


def metrics(stage: str, epochs: range, names: tuple[str, ...] = TERMS) -> list[dict]:
    return [{"stage": stage, "epoch": e, "step": e, "name": n, "value": 1 / (e + 2)} for e in epochs for n in names]


def pairs(confusion_KK: np.ndarray) -> np.ndarray:
    """Its entries that aren't 0, as evaluation writes them."""
    return np.column_stack([*np.nonzero(confusion_KK), confusion_KK[np.nonzero(confusion_KK)]])


def report(classes: list[str], **changes: object) -> str:
    confusion = 8 * np.eye(len(classes), dtype=int)
    confusion[0, 1:] = 1
    values = {
        "settings": RunSettings(name="finches").model_dump(mode="json"),
        "stages": [
            StageReport("02-joint", 200.0, 0.9, 0.91),
            StageReport("03-push", 7.0, 0.8, 0.81),
            StageReport("04-last-layer", 5.0, 0.92, 0.93),
        ],
        "metrics": metrics("02-joint", range(4)),
        "classes": classes,
        "bundle": "runs/finches/bundle",
        "summary": {"test_accuracy": 0.93, "seconds": 215.0, "versions": {"torch": "2.15"}},
        "confusion": pairs(confusion),
        "prototypes": prototypes(classes),
    }
    return write_report(RunReport(**(values | changes)))  # type: ignore[arg-type]


def test_the_calibration_error_is_in_the_headline() -> None:
    assert "3.1 % (12.0 % before)" in report(["wren", "jay"], calibration=(0.12, 0.031))
    assert "calibration error" not in report(["wren", "jay"])


class Page(HTMLParser):
    """Tags that are opened and closed, and what the page would fetch."""

    EMPTY = ("meta", "img", "input", "rect", "path", "use", "br", "col")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:image/jpeg")):
                self.fetched.append(value)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_file_that_fetches_nothing_says_everything() -> None:
    text = report(["robin", "wren", "siskin"])
    page = Page(text)
    assert page.fetched == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)  # only references inside the charts
    for said in (
        "finches",
        "93.0 %",
        "3 min 35 s",
        "runs/finches/bundle",
        "Push prototypes",
        "siskin",
        "model.backbone",
    ):
        assert said in page.text
    assert text.count('class="picture"') == 6
    assert page.count["image"] == 3  # two prototypes an image
    assert page.count["figure"] == 6  # accuracy and five loss terms


def test_colours_of_the_charts_follow_the_page() -> None:
    text = report(["robin", "wren"])
    assert "var(--series-1)" in text
    assert not re.search(r"#0[123]0[123]0[1234]\b", text)


def test_the_box_is_drawn_in_pixels_of_the_original() -> None:
    text = report(["robin", "wren"])
    assert text.count('viewBox="0 0 120 80"') == 4
    assert text.count('<rect class="box" x="85" y="5" width="35" height="25"/>') == 4


def test_a_push_is_marked_at_the_epoch_it_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[list[float]] = []
    draw = charts.curves_chart
    monkeypatch.setattr(
        charts, "curves_chart", lambda curves, pushes, **rest: marked.append(pushes) or draw(curves, pushes, **rest)
    )
    stages = [StageReport(name, 1.0) for name in ("02-joint", "03-push", "04-last-layer", "05-joint", "06-push")]
    report(["robin", "wren"], stages=stages, metrics=metrics("02-joint", range(6)) + metrics("05-joint", range(6, 10)))
    assert marked[0] == [6, 10]


def test_a_baseline_has_no_prototypes() -> None:
    settings = RunSettings.model_validate({"model": {"kind": "baseline"}}).model_dump(mode="json")
    rows = metrics("02-joint", range(3), ("total", "cross_entropy", "accuracy"))
    page = Page(report(["robin", "wren"], prototypes=None, settings=settings, metrics=rows))
    assert "image" not in page.count
    assert page.count["figure"] == 3
    assert "black-box baseline" in page.text


def test_a_run_with_hardly_anything_still_has_a_report() -> None:
    page = Page(report(["robin", "wren"], prototypes=None, confusion=None, metrics=[], stages=[], summary={}))
    assert "No epoch was trained" in page.text


def test_names_are_text_not_markup() -> None:
    text = report(["<script>alert(1)</script>", 'quo"te & co', "wren"])
    assert "<script>alert" not in text
    assert 'quo"te & co' in Page(text).text


def test_many_classes_are_folded_and_their_pictures_small() -> None:
    classes = [f"{number:03d}.Kind_of_bird_{number}" for number in range(210)]
    text = report(classes, prototypes=prototypes(classes))
    page = Page(text)
    assert page.count["details"] == 211
    assert "<details open" not in text
    assert text.count('class="picture"') == 420
    assert len(text) < 2_000_000


def test_a_confusion_matrix_is_a_table_where_it_is_small_and_the_commonest_mistakes_where_not() -> None:
    small = report(["robin", "wren"], confusion=[[0, 0, 3], [0, 1, 1], [1, 1, 4]])
    assert '<th scope="row">robin</th><td class="right" style="--share:44%">3</td><td class="wrong"' in small
    assert small.count("<td></td>") == 2  # the corner, and no wren taken for a robin
    confusion = np.eye(200, dtype=int)
    confusion[7, 9] = 5
    large = Page(report([f"kind {number}" for number in range(200)], confusion=pairs(confusion), prototypes=None))
    assert "5 of 6" in large.text
    assert large.count["td"] - Page(small).count["td"] < 100  # beside the settings: none for each pair


def test_the_commonest_mistakes_come_first() -> None:
    confusion = np.array([[5, 2, 0], [0, 9, 0], [1, 4, 3]])
    found = most_confused(pairs(confusion), ["a", "b", "c"])
    assert [(pair["true"], pair["predicted"], pair["count"], pair["of"]) for pair in found] == [
        ("c", "b", 4, 8),
        ("a", "b", 2, 7),
        ("c", "a", 1, 8),
    ]


def test_words() -> None:
    assert [duration(s) for s in (0.04, 8.24, 59.97, 215, 7502)] == [
        "0.0 s",
        "8.2 s",
        "1 min 0 s",
        "3 min 35 s",
        "2 h 5 min",
    ]
    assert readable_names(["001.Black_footed_Albatross", "7", "a_b"]) == ["Black footed Albatross", "7", "a b"]
    assert readable_names(["1.wren", "2.wren"]) == ["1.wren", "2.wren"]
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": 2}) == [("a.b", 1), ("a.c.d", None), ("e", 2)]


def test_explained_images_and_the_quality_of_explanations_are_shown():
    names = readable_names(MADE_CLASSES)
    images: dict = {}
    shown = explained_image("a bird.jpg", half_and_half(), explanation([4.126, 3.0], 1.0), album(), names, images)
    examples = [
        {**shown, "right": True, "verdict": "Recognised as what it is: Blue Jay."},
        {**shown, "right": False, "verdict": "House Wren, taken for Blue Jay"},
    ]
    quality = quality_table({"sparsity": {"value": 0.25, "prototypes": 60}})
    text = report(["wren", "jay"], examples=examples, images=images, quality=quality)
    words = " ".join(text.split())
    assert words.index("Explained test images") < words.index('id="curves"')
    for said in ("House Wren, taken for Blue Jay", "4.13", "8.13", "7 other prototypes together", "0.25", "sparsity"):
        assert said in words
    assert 'href="#examples"' in text
    assert not re.search(r"url\((?!data:|#)", text)
    without = report(["wren", "jay"])
    assert "Explained test images" not in without
    assert "Quality of the explanations" not in without


def test_the_surest_answers_are_explained_right_and_wrong_each_of_another_class():
    rows = [  # image_id, label, prediction, probability
        (0, 0, 0, 0.7), (1, 0, 0, 0.9), (2, 1, 1, 0.8), (3, 1, 0, 0.6), (4, 1, 2, 0.95), (5, 2, 2, 0.5), (6, 2, 0, 0.3)
    ]  # fmt: skip
    table = pa.table(
        dict(zip(("image_id", "label", "prediction", "probability"), zip(*rows, strict=True), strict=True))
    )
    assert choose_examples(table, each=2) == ([1, 2], [4, 6])
    assert choose_examples(table.filter(pa.compute.equal(table["label"], table["prediction"]))) == ([1, 2, 5], [])
