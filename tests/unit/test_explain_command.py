"""The files that jobs/explain.py writes: one for each image and class, whatever they are called."""

from pathlib import Path

import pytest
from made_evidence import album, explanation, half_and_half

from protopnet.api.results import Results, Why
from protopnet.commands.explain import _write_figures
from protopnet.evidence.records import Explanation


def why(uri: str, explained: Explanation) -> Why:
    return Why(uri, explained, half_and_half(), album())


@pytest.mark.parametrize(
    "uris",
    [
        ["a/x.jpg", "b/x.jpg", "1-x.jpg"],
        ["a/x.jpg", "b/X.JPG"],
        ["x", "x-1-001.Blue_Jay.png"],
        ["s3://b/x.jpg", "s3://b/x.jpg", "2-x.jpg", "1-x.jpg"],
    ],
)
def test_each_image_has_figures_of_its_own(uris: list[str], tmp_path: Path) -> None:
    _write_figures(str(tmp_path), Results(why(uri, explanation([1.0], 0.5)) for uri in uris))
    assert len({path.name.casefold() for path in tmp_path.iterdir()}) == len(uris)


def test_a_figure_is_not_that_of_another_image_whose_name_goes_on_as_this_one_does(tmp_path: Path) -> None:
    """Place and class of the first are the end of the second's name."""
    first, second = explanation([1.0], 0.5), explanation([1.0], 0.5)
    first = first.model_copy(update={"classes": [first.top.model_copy(update={"class_name": "1-Jay"})]})
    second = second.model_copy(update={"classes": [second.top.model_copy(update={"class_name": "Jay"})]})
    _write_figures(str(tmp_path), Results([why("x", first), why("x-1", second)]))
    assert len(list(tmp_path.iterdir())) == 2


def test_no_points_are_not_less_than_none() -> None:
    assert "-0.00" not in why("x", explanation([-0.001], 0.0)).verdict


def test_the_verdict_calls_a_prototype_by_its_name() -> None:
    plain = explanation([11.2], 0.5)
    (entry,) = plain.classes
    first = entry.evidence[0].model_copy(update={"name": "red bill"})
    named = plain.model_copy(update={"classes": [entry.model_copy(update={"evidence": [first]})]})
    assert "most, 11.20, from red bill (prototype 0) of" in why("x", named).verdict
    assert "most, 11.20, from prototype 0 of" in why("x", plain).verdict
