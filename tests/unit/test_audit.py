"""The audit on hand-made cases: what it counts, what it flags, in which words, and that its pages need nothing else."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_prototypes import CLASS_P, CLASSES, jpeg, points, prototypes

from protopnet.auditing.audit import audit_bundle
from protopnet.auditing.audit_pages import AuditPages, class_path
from protopnet.auditing.close_pairs import close_pairs
from protopnet.auditing.findings import AuditSettings
from protopnet.auditing.judgement import Audit, audit
from protopnet.auditing.patch_table import NEAREST_SCHEMA, nearest_table
from protopnet.auditing.usage import Use
from protopnet.config import ModelSettings
from protopnet.datasets.masks import packed
from protopnet.errors import UserError
from protopnet.model.bundle import Bundle
from protopnet.model.network import build_network


def neighbours(
    labels: list[list[int]],
    on_object: float | None = None,
    split: str = "train",
    at: tuple[int, int] | None = None,
) -> pa.Table:
    """For each prototype the classes of its nearest images; in one and the same cell of 4 x 4 where one is given."""
    rows = [
        {
            "prototype": p,
            "split": split,
            "rank": rank + 1,
            "distance": 0.1 * rank,
            "similarity": 1.0 - 0.1 * rank,
            "image_id": 100 + rank,
            "uri": f"{rank}.jpg",
            "class": label,
            "class_name": CLASSES[label],
            "own_class": bool(label == CLASS_P[p]),
            "is_source": False,
            "width": 120,
            "height": 80,
            "row": (at if at else (rank % 4, 0))[0],
            "column": (at if at else (rank % 4, 0))[1],
            "box": [0, 0, 40, 40],
            "on_object": on_object,
            "activation_map": np.eye(4).tolist(),
        }
        for p, of_prototype in enumerate(labels)
        for rank, label in enumerate(of_prototype)
    ]
    return pa.Table.from_pylist(rows, NEAREST_SCHEMA)


OWN = [[0] * 6, [0] * 6, [1] * 6, [1] * 6]


def used(**changes: object) -> Use:
    """Each prototype among the top evidence, each class on its own prototypes, every image right."""
    values = {
        "first_P": np.ones(4),
        "top_P": np.full(4, 5.0),
        "points_P": np.full(4, 20.0),
        "own_distance_P": np.full(4, 10.0),
        "images_K": np.full(2, 10.0),
        "right_K": np.full(2, 10.0),
        "predicted_K": np.full(2, 10.0),
        "own_points_K": np.full(2, 90.0),
        "other_points_K": np.full(2, 10.0),
        "against_K": np.full(2, -5.0),
        "errors": Counter(),
    }
    return Use(**(values | changes))  # type: ignore[arg-type]


def no_pairs() -> pa.Table:
    return pairs_of()


def pairs_of(*pairs: tuple[int, int]) -> pa.Table:
    apart = torch.arange(4.0)[:, None, None, None] * torch.ones(1, 2, 1, 1)
    table = close_pairs(apart, CLASS_P, np.ones(4), "log", within_class=100, across_classes=100)
    named = zip(table["prototype"].to_pylist(), table["other"].to_pylist(), strict=True)
    return table.filter(pa.array([pair in pairs for pair in named], pa.bool_()))


def judged(
    nearest: pa.Table | None = None,
    pairs: pa.Table | None = None,
    use: Use | None = None,
    table: pa.Table | None = None,
) -> Audit:
    return audit(
        prototypes() if table is None else table,
        neighbours(OWN) if nearest is None else nearest,
        no_pairs() if pairs is None else pairs,
        use or used(),
        CLASSES,
        AuditSettings(),
        "train",
    )


class TestFindings:
    def test_nothing_is_found_where_all_is_well(self) -> None:
        found = judged()
        assert found.findings == []
        assert found.prototypes["flags"].to_pylist() == [[], [], [], []]
        assert found.prototypes["mean_points"].to_pylist() == [2, 2, 2, 2]
        assert found.prototypes["top_share"].to_pylist() == [0.25] * 4
        assert found.prototypes["nearest_own"].to_pylist() == [6, 6, 6, 6]
        assert found.prototypes["on_object"].to_pylist() == [None] * 4
        assert found.classes["own_share"].to_pylist() == [0.9, 0.9]
        assert found.findings_table().num_rows == 0

    @pytest.mark.parametrize(("own", "severity"), [(3, None), (2, 2), (1, 3), (0, 3)])
    def test_nearest_patches_of_other_classes(self, own: int, severity: int | None) -> None:
        found = judged(neighbours([[0] * own + [1] * (6 - own), *OWN[1:]])).findings
        assert [each.severity for each in found] == ([] if severity is None else [severity])
        if found:
            assert found[0].prototypes == (0,)
            assert f"{6 - own} show other classes: White Gull ({6 - own})" in found[0].text

    def test_validation_images_do_not_decide_that(self) -> None:
        both = pa.concat_tables([neighbours(OWN), neighbours([[1] * 5] * 4, split="validation")]).sort_by("prototype")
        assert judged(both).findings == []

    @pytest.mark.parametrize(("share", "severity"), [(0.25, None), (0.2, 2), (0.1, 3)])
    def test_the_background(self, share: float, severity: int | None) -> None:
        found = judged(neighbours(OWN, on_object=share)).findings
        assert [(each.kind, each.severity) for each in found] == ([("background", severity)] * 4 if severity else [])

    @pytest.mark.parametrize("at", [(0, 1), (3, 2), (1, 0), (2, 2)])
    def test_one_place_by_the_edge(self, at: tuple[int, int]) -> None:
        found = judged(neighbours([OWN[0]], at=at)).findings
        by_the_edge = at != (2, 2)
        assert [(each.kind, each.severity, each.prototypes) for each in found] == [
            ("same-place", 3, (0,))
        ] * by_the_edge
        for each in found:
            assert each.region is not None
            top, left, bottom, right = each.region
            assert 0 <= top < (at[0] + 0.5) / 4 < bottom <= 1
            assert 0 <= left < (at[1] + 0.5) / 4 < right <= 1
        small = prototypes().set_column(11, "receptive_field", pa.array([[8, 30, 40, 60]] * 4, pa.list_(pa.int32(), 4)))
        seen = judged(neighbours([OWN[0]], at=at), table=small).findings
        assert [each.region for each in seen] == [(0.1, 0.25, 0.5, 0.5)] * by_the_edge  # what the patch sees
        few = judged(neighbours([OWN[0][:2]], at=at)).findings
        assert "same-place" not in {each.kind for each in few}  # two images are no pattern

    def test_a_class_that_rests_on_others(self) -> None:
        use = used(own_points_K=np.array([10.0, 90.0]), other_points_K=np.array([90.0, 10.0]))
        found = judged(use=use).findings
        assert [(each.kind, each.label, each.prototypes, each.severity) for each in found] == [("borrowed", 0, (), 3)]
        assert "only 10 % of the points" in found[0].text
        no_points = used(own_points_K=np.zeros(2), other_points_K=np.zeros(2))
        assert judged(use=no_points).findings == []

    def test_errors_are_those_that_the_twin_of_the_other_class_caused(self) -> None:
        errors = {(2, 0): 3, (1, 1): 1, (3, 0): 7, (0, 1): 5}  # (first prototype, true class)
        found = judged(pairs=pairs_of((1, 2)), use=used(errors=errors))
        assert found.pairs["errors"].to_pylist() == [4]
        assert [(each.kind, each.severity, each.prototypes, each.errors) for each in found.findings] == [
            ("confused", 3, (1, 2), 4)
        ]
        assert "4 training images" in found.findings[0].text
        assert found.prototypes["flags"].to_pylist() == [[], ["confused"], ["confused"], []]

    def test_twins_without_errors_are_minor(self) -> None:
        assert [each.severity for each in judged(pairs=pairs_of((1, 2))).findings] == [1]

    def test_repeats_by_patch_and_by_vector(self) -> None:
        table = prototypes()
        found = judged(pairs=pairs_of((0, 1), (2, 3)))
        assert [(each.kind, each.severity, each.prototypes) for each in found.findings] == [
            ("repeated", 1, (0, 1)),
            ("repeated", 1, (2, 3)),
        ]
        assert found.prototypes["flags"].to_pylist() == [[], ["repeated"], [], ["repeated"]]
        same_image = table.set_column(table.column_names.index("sha256"), "sha256", pa.array(["a", "a", "b", "c"]))
        found = judged(pairs=pairs_of((0, 1), (2, 3)), table=same_image).findings
        assert [(each.severity, each.prototypes) for each in found] == [(2, (0, 1)), (1, (2, 3))]
        assert "same patch" in found[0].text

    def test_never_among_the_top_evidence(self) -> None:
        found = judged(use=used(top_P=np.array([5.0, 0.0, 5.0, 5.0]))).findings
        assert [(each.kind, each.prototypes, each.severity) for each in found] == [("unused", (1,), 1)]

    def test_pairs_that_hang_together_are_one_finding(self) -> None:
        use = used(errors={(2, 0): 3, (1, 1): 1})
        found = judged(pairs=pairs_of((0, 2), (1, 2)), use=use)
        assert found.pairs["errors"].to_pylist() == [4, 3]  # (1, 2) is the nearer
        assert [(each.prototypes, each.errors, each.severity) for each in found.findings] == [((0, 2, 1), 4, 3)]
        assert found.findings[0].text.startswith("Prototypes 0 and 1 of Black Gull and prototype 2 of White Gull look")

    def test_the_most_severe_first_then_by_errors(self) -> None:
        nearest, pairs = neighbours([[1] * 6, *OWN[1:]]), pairs_of((0, 2), (1, 3))
        found = judged(nearest, pairs, used(errors={(2, 0): 1, (3, 0): 2}, top_P=np.zeros(4)))
        # An error with prototype 3 first is explained by its twin 1 of the true class.
        assert [each.severity for each in found.findings] == [3, 3, 3, 1, 1, 1, 1]
        assert [(each.kind, each.errors) for each in found.findings[:3]] == [
            ("confused", 2),
            ("confused", 1),
            ("other-classes", 0),
        ]
        assert found.counts()["by_severity"] == {"serious": 3, "worth a look": 0, "minor": 4}
        assert found.counts()["prototypes_with_findings"] == 4

    def test_then_those_that_decide_more_images(self) -> None:
        nearest = neighbours([[1] * 6, [1] * 6, OWN[2], [0] * 6])
        found = judged(nearest, use=used(first_P=np.array([1.0, 4.0, 9.0, 2.0]))).findings
        assert [each.prototypes for each in found] == [(1,), (3,), (0,)]


def test_the_nearest_patches_as_one_table() -> None:
    places = {"prototype": [0, 0, 2], "image_id": [7, 5, 5], "label": [1, 0, 0], "distance": [0.1, 0.2, 0.3]}
    candidates = {"train": pa.table(places).slice(0, 2), "validation": pa.table(places).slice(2, 1)}
    described = prototypes().take([0, 0, 2]).drop_columns(["thumbnail", "image_id", "prototype", "sha256"])
    for name, values in {"prototype": [0, 0, 2], "image_id": [5, 7, 5], "sha256": ["sha 0", "x", "sha 0"]}.items():
        described = described.append_column(name, pa.array(values))
    square = points((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    rows = pa.table({"image_id": [5, 7], "parts": pa.array([square, None]), "object": pa.nulls(2, pa.binary())})
    table = nearest_table(candidates, described, rows, prototypes(), CLASSES)
    assert table.schema == NEAREST_SCHEMA
    columns = ("prototype", "split", "rank", "image_id", "own_class", "is_source", "on_object")
    assert [tuple(row[name] for name in columns) for row in table.to_pylist()] == [
        (0, "train", 1, 7, False, False, None),
        (0, "train", 2, 5, True, True, 1.0),
        (2, "validation", 1, 5, False, False, 1.0),
    ]
    corner, left = packed(np.array([[0, 1], [0, 0]])), packed(np.array([[1, 0]]))  # the map is a diagonal
    masked = rows.set_column(2, "object", pa.array([corner, left]))
    shares = nearest_table(candidates, described, masked, prototypes(), CLASSES)["on_object"].to_pylist()
    assert shares == [pytest.approx(0.5, abs=0.02), *[pytest.approx(0, abs=0.02)] * 2]  # a mask says more than points


def test_a_bundle_that_does_not_know_its_sources_is_refused() -> None:
    settings = ModelSettings(backbone="squeezenet1_0", image_size=64, prototype_depth=4, prototypes=4)
    bundle = Bundle(build_network(settings, 2), None, None, "")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"where its prototypes come from.*prototypes\.parquet"):
        audit_bundle(bundle, None, AuditSettings(), None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- pages

COMMAND = "python jobs/prune.py bundle data"


def pages(found: Audit, title: str = "tiny") -> dict[str, str]:
    thumbnails = {100 + rank: jpeg("teal") for rank in range(6)}
    return dict(
        AuditPages(title, found, prototypes(), thumbnails, [("prototypes", "4")], [("top", 5)], "validation", COMMAND)
    )


class TestPages:
    @pytest.fixture
    def written(self) -> dict[str, str]:
        nearest = pa.concat_tables([neighbours([[0, 0, 1, 1, 1, 1], *OWN[1:]]), neighbours(OWN, split="validation")])
        return pages(judged(nearest.sort_by([("prototype", "ascending")]), pairs_of((0, 1))))

    def test_a_page_a_class_and_the_first_page_last(self, written: dict[str, str]) -> None:
        assert list(written) == [class_path(0), class_path(1), "index.html"]
        assert class_path(0) in written["index.html"]

    def test_what_puts_findings_right_can_be_typed(self, written: dict[str, str]) -> None:
        assert f"<code>{COMMAND} --remove 1 --output corrected</code>" in written["index.html"]

    def test_nothing_is_fetched(self, written: dict[str, str]) -> None:
        for page in written.values():
            links = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)""", page)
            for link in (first or second for first, second in links):
                assert link.startswith(("data:image/", "#", "classes/", "../"))

    def test_each_image_is_inlined_once_and_every_use_has_one(self, written: dict[str, str]) -> None:
        for page in written.values():
            inlined = re.findall(r'<image id="(\w+)"', page)
            assert len(set(inlined)) == len(inlined)
            assert set(re.findall(r'<use href="#(\w+)"', page)) == set(inlined)
        assert len(re.findall(r'<image id="', written[class_path(0)])) == 6 + 2

    def test_what_the_authors_show_is_there(self, written: dict[str, str]) -> None:
        page = written[class_path(0)]
        assert page.count("<article") == 2
        first = page[page.index('id="p0"') : page.index('id="p1"')]
        assert first.count("<use") == 3 + 6 + 6  # the source three times, nearest in training and validation
        assert first.count('class="heat"') == 1 + 12
        assert 'viewBox="20 10 40 20"' in first  # the patch alone: left, top, width, height
        assert "2 of 6 show Black Gull" in first
        assert first.count("≠ White Gull") == 4
        assert "top evidence for <b>5</b> validation images" in first

    def test_findings_lead_to_prototypes(self, written: dict[str, str]) -> None:
        assert f'href="{class_path(0)}#p0"' in written["index.html"]
        assert 'data-kind="other-classes"' in written["index.html"]

    def test_names_break_nothing(self) -> None:
        found = replace(judged(neighbours([[1] * 6, *OWN[1:]])), class_names=["</script><b>", 'a "b" & c'])
        written = pages(found, title="<i>")
        for page in written.values():
            assert "</script><b>" not in page
            assert "<i>" not in page.replace("<i></i>", "").split("<body", 1)[0]
