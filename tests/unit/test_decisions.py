"""Decisions about prototypes as data: what a file may say, what it comes to for a bundle, and what no longer applies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import yaml
from documents import first_column, section

from protopnet.auditing.barred_patches import BarredRegion, Bars
from protopnet.auditing.decisions import (
    DECISION_SCHEMA,
    KINDS,
    PrototypeRef,
    corrections_yaml,
    decisions_table,
    parse_decision,
    record_of,
)
from protopnet.auditing.draft import Merge
from protopnet.auditing.prune import Corrections
from protopnet.auditing.settling import Prototypes, Settled, settle
from protopnet.cli import parse
from protopnet.datasets.masks import packed
from protopnet.errors import UserError

CLASSES = ["jay", "wren"]
GRID = (4, 4)
ABOUT = {"who": "anna", "when": "2026-11-25T22:00:00Z", "why": "seen"}


def table(places: list[tuple[str, int, int]], labels: list[int]) -> pa.Table:
    return pa.table(
        {
            "sha256": [f"sha-{image}" for image, _, _ in places],
            "uri": [f"birds/{image}.jpg" for image, _, _ in places],
            "row": [row for _, row, _ in places],
            "column": [column for _, _, column in places],
            "class": labels,
            "class_name": [CLASSES[label] for label in labels],
        }
    )


# Two jays on one patch, a third elsewhere; three wrens.
PLACES = [("a", 0, 1), ("a", 0, 1), ("b", 2, 2), ("c", 0, 0), ("c", 3, 3), ("d", 1, 1)]
HERE = Prototypes(table(PLACES, [0, 0, 0, 1, 1, 1]), GRID, "here")


def decided(*decisions: dict[str, Any], on: Prototypes = HERE, made_for: str | None = "here", **more: Any) -> Settled:
    parsed = [parse_decision(ABOUT | each) for each in decisions]
    images = [f"sha-{image}" for image in "abcd"]
    return settle(parsed, on, made_for=made_for, classes=CLASSES, images=images, **more)


def drop(prototype: Any) -> dict[str, Any]:
    return {"decide": "drop", "prototype": prototype}


def merge(prototype: Any, into: Any) -> dict[str, Any]:
    return {"decide": "merge", "prototype": prototype, "into": into}


def reasons(settled: Settled) -> list[str]:
    return [each.reason for each in settled.lapsed]


class TestSettling:
    def test_each_decision_comes_to_what_it_says(self) -> None:
        settled = decided(
            drop(3),
            {"decide": "not-this-patch", "prototype": 2, "elsewhere": True},
            merge(1, 0),
            {"decide": "keep", "prototype": 4},
            {"decide": "name", "prototype": 0, "name": "blue crest"},
            {"decide": "group", "prototypes": [0, 4], "group": "crest"},
            {"decide": "must-be-used", "prototype": 5, "floor": 2},
            {"decide": "not-in-region", "region": [0, 0, 0.25, 1], "class": "jay"},
        )
        assert (settled.dropped, settled.merges, settled.moved) == ([3], [Merge(0, [1])], {2: True})
        assert (settled.kept, settled.names) == ({4}, {0: "blue crest"})
        assert settled.groups == {0: "crest", 4: "crest"}
        assert settled.regions == [BarredRegion((0, 0, 0.25, 1), "jay")]
        assert settled.floors == {5: 2.0}
        assert settled.lapsed == []

    def test_the_last_word_about_a_prototype_counts(self) -> None:
        settled = decided(drop(0), {"decide": "keep", "prototype": 0}, {"decide": "not-this-patch", "prototype": 0})
        assert (settled.dropped, settled.kept, settled.moved) == ([], set(), {0: False})

    def test_a_class_keeps_one_prototype(self) -> None:
        settled = decided(drop(3), drop(4), drop(5), {"decide": "keep", "prototype": 3}, drop(5), removed=[2])
        assert settled.dropped == [2, 4, 5]
        assert [each.decision for each in settled.lapsed] == [3]
        assert "the last one of wren" in settled.lapsed[0].reason
        assert "the last one of jay" in reasons(decided(drop(0), merge(1, 0), removed=[2]))[0]

    def test_merges_end_in_a_prototype_that_stays(self) -> None:
        settled = decided(merge(0, 1), merge(1, 2))
        assert settled.merges == [Merge(2, [0, 1])]
        assert "gone itself" in reasons(decided(merge(0, 1), merge(1, 0)))[0]
        assert "two classes: group them" in reasons(decided(merge(0, 3)))[0]
        assert decided(merge(3, 4), drop(4)).dropped == [3, 4]

    def test_a_prototype_is_known_by_its_patch_and_among_equal_ones_by_its_number(self) -> None:
        patch = {"sha256": "sha-a", "row": 0, "column": 1}
        assert decided(drop({"number": 1} | patch)).dropped == [1]
        assert decided(drop({"number": 5} | patch)).dropped == [0]
        assert decided(drop({"uri": "birds/c.jpg", "row": 3, "column": 3})).dropped == [4]
        assert "no prototype of the bundle is the patch" in reasons(decided(drop(patch | {"class": "wren"})))[0]

    def test_numbers_count_in_their_own_bundle_only(self) -> None:
        trained_anew = Prototypes(table(PLACES[::-1], [1, 1, 1, 0, 0, 0]), GRID, "anew")
        by_both = HERE.ref(4).model_dump(by_alias=True)
        settled = decided(drop(4), drop(by_both), on=trained_anew)
        assert settled.dropped == [1]
        assert "known by its number alone" in reasons(settled)[0]
        assert decided(drop(4), on=trained_anew, made_for=None).dropped == [4]
        assert "are 0 to 5" in reasons(decided(drop(6)))[0]

    def test_on_another_grid_it_is_the_patch_in_which_the_middle_lies(self) -> None:
        finer = Prototypes(table([("b", 5, 5), ("b", 6, 6), ("b", 4, 5)], [0, 0, 0]), (8, 8), "finer")
        assert decided(drop(HERE.ref(2).model_dump(by_alias=True)), on=finer).dropped == [0]
        coarser = Prototypes(table([("b", 1, 1), ("b", 0, 0)], [0, 0]), (2, 2), "coarser")
        assert decided(drop(HERE.ref(2).model_dump(by_alias=True)), on=coarser).dropped == [0]

    def test_regions_of_what_is_not_there(self) -> None:
        region = {"decide": "not-in-region", "region": "background"}
        settled = decided(region | {"class": "crow"}, region | {"sha256": "sha-z", "uri": "z.jpg"}, region)
        assert reasons(settled) == ["the bundle has no class 'crow'", "z.jpg is no training image here"]
        assert settled.regions == [BarredRegion("background")]

    def test_of_a_group_those_that_are_here(self) -> None:
        settled = decided({"decide": "group", "prototypes": [0, 9, 4], "group": "crest"})
        assert settled.groups == {0: "crest", 4: "crest"}
        assert len(settled.lapsed) == 1


class TestTheFile:
    @pytest.fixture
    def read(self, tmp_path: Path) -> Callable[[str], Corrections]:
        def read(text: str) -> Corrections:
            (tmp_path / "corrections.yaml").write_text(text)
            return parse(Corrections, ["--config", str(tmp_path / "corrections.yaml")])

        return read

    def test_what_is_written_is_read(self, read: Callable[[str], Corrections]) -> None:
        ref = HERE.ref(1).model_dump(by_alias=True)
        given = [
            merge(ref, HERE.ref(0).model_dump(by_alias=True)),
            {"decide": "name", "prototype": ref, "name": "röter: 'bill'"},
            {"decide": "not-in-region", "region": [0, 0.1, 0.3333333333333333, 1], "prototype": ref},
        ]
        decisions = [parse_decision(ABOUT | each) for each in given]
        corrections = read(corrections_yaml(decisions, "here"))
        assert (corrections.decisions, corrections.made_for) == (decisions, "here")
        again = Corrections(**corrections.record())
        assert again == corrections

    def test_a_list_of_any_length(self, read: Callable[[str], Corrections]) -> None:
        decisions = [parse_decision(ABOUT | drop(number)) for number in range(2000)]
        assert len(read(corrections_yaml(decisions, "here")).decisions) == 2000
        assert len(read(yaml.safe_dump({"remove": list(range(25_000))})).remove) == 25_000

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"decide": "explode"}, "number 2 is not valid: Input tag 'explode'"),
            ({"prototype": {"uri": "a.jpg"}}, "prototype: expected row and column of the patch"),
            ({"prototype": {"row": 1}}, "prototype: expected a number, or uri"),
            ({"who": ""}, "who: "),
            ({"when": "2026-11-25T22:00:00"}, "when: Input should have timezone info"),
            ({"because": "x"}, "because: Extra inputs"),
            ({"decide": "not-in-region", "region": [0.5, 0, 0.5, 1]}, "region: expected top, left, bottom, right"),
            ({"decide": "not-in-region", "region": [0, 0, 2, 1]}, "region"),
        ],
    )
    def test_what_is_wrong_is_said_in_a_line(
        self, read: Callable[[str], Corrections], change: dict[str, Any], said: str
    ) -> None:
        content = {"decisions": [ABOUT | drop(1), ABOUT | drop(1) | change]}
        with pytest.raises(UserError) as caught:
            read(yaml.safe_dump(content))
        assert str(caught.value).startswith("decisions: number 2")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_record_for_auditors(self) -> None:
        settled = decided(drop(1), drop({"sha256": "sha-z", "row": 0, "column": 0}))
        given = [ABOUT | drop(HERE.ref(1).model_dump(by_alias=True)), ABOUT | drop(9)]
        entry = {
            "bundle": "here",
            "settings": {"decisions": [record_of(parse_decision(each)) for each in given]},
            "lapsed": [{"decision": 2, "reason": settled.lapsed[0].reason}],
        }
        rows = decisions_table([{"bundle": "older", "settings": {}}, entry])
        assert rows.schema == DECISION_SCHEMA
        assert rows["applied"].to_pylist() == [True, False]
        first = rows.to_pylist()[0]
        assert (first["who"], first["why"], first["decide"]) == ("anna", "seen", "drop")
        assert (first["prototype"], first["uri"], first["row"], first["column"]) == (1, "birds/a.jpg", 0, 1)
        assert first["when"].isoformat() == "2026-11-25T22:00:00+00:00"

    def test_the_documents_say_what_there_is(self, read: Callable[[str], Corrections]) -> None:
        text = section("Corrections")
        assert first_column(text, "column of `decisions.parquet`") == set(DECISION_SCHEMA.names)
        kinds = {literal for each in KINDS for literal in get_args(each.model_fields["decide"].annotation)}
        assert first_column(text, "`decide`") == kinds
        example = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
        assert [each.decide for each in read(example).decisions] == ["not-in-region", "name"]

    def test_a_prototype_in_words(self) -> None:
        assert str(HERE.ref(1)) == "prototype 1 of jay (birds/a.jpg, row 0, column 1)"
        assert str(PrototypeRef(number=3)) == "prototype 3"


IMAGES = pa.table(
    {
        "image_id": [0, 1, 2],
        "sha256": ["a", "b", "c"],
        "class_name": ["jay", "jay", "wren"],
        "height": [100, 37, 50],
        "width": [100, 61, 50],
        "parts": [
            [{"part": "p", "x": x, "y": y} for x, y in ((0.3, 0.3), (0.7, 0.3), (0.5, 0.7))],
            None,
            [{"part": "p", "x": 0.1, "y": 0.1}],
        ],
        "object": pa.nulls(3, pa.binary()),
    }
)


class TestRegions:
    def test_the_same_place_on_every_image_of_a_class(self) -> None:
        bars = Bars.of([BarredRegion((0, 0.75, 0.25, 1), "jay")], IMAGES, (4, 4), (1, 1))
        assert sorted(bars.masks) == [0, 1]
        assert [np.argwhere(mask).tolist() for mask in bars.masks.values()] == [[[0, 3]]] * 2

    @pytest.mark.parametrize("cells", range(1, 30))
    def test_a_cell_s_own_box_is_that_cell(self, cells: int) -> None:
        for cell in range(cells):
            box = (cell / cells, cell / cells, (cell + 1) / cells, (cell + 1) / cells)
            bars = Bars.of([BarredRegion(box, sha256="b")], IMAGES, (cells, cells), (1, 1))
            assert np.argwhere(bars.masks[1]).tolist() == [[cell, cell]]

    def test_the_background_is_what_lies_off_the_outline(self) -> None:
        bars = Bars.of([BarredRegion("background")], IMAGES, (8, 8), (1, 1))
        assert not bars.masks[1].any()  # no key points: nobody knows
        assert not bars.masks[2].any()
        off = bars.masks[0]
        assert off[0].all()
        assert off[:, 0].all()
        assert not off[3, 3:5].any()
        grid = packed(np.array([[1, 0]]))  # what has a mask needs no key points
        masked = IMAGES.set_column(IMAGES.column_names.index("object"), "object", pa.array([None, grid, None]))
        assert (
            Bars.of([BarredRegion("background")], masked, (8, 8), (1, 1)).masks[1].tolist()
            == [[False] * 4 + [True] * 4] * 8
        )
        patches = Bars.of([BarredRegion("background")], IMAGES, (8, 8), (2, 2)).masks[0]
        assert patches.shape == (7, 7)
        assert not patches[2, 2]  # a corner of it is on the object
