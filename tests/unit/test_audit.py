"""The audit on hand-made cases: what it counts, what it flags, in which words, and that its pages need nothing else."""

import io
import re
import shlex
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protopnet.auditing.audit import audit_bundle
from protopnet.auditing.audit_pages import AuditPages, class_path
from protopnet.auditing.close_pairs import NEIGHBOURS, close_pairs
from protopnet.auditing.findings import AuditSettings, Finding
from protopnet.auditing.judgement import Audit, audit
from protopnet.auditing.patch_table import NEAREST_SCHEMA, most_active, nearest_table, share_on_object
from protopnet.auditing.remedies import remedies
from protopnet.auditing.usage import Use, use_of_batch
from protopnet.config import ModelSettings
from protopnet.datasets.masks import packed
from protopnet.errors import UserError
from protopnet.model.bundle import PROTOTYPE_SCHEMA, Bundle
from protopnet.model.network import Output, build_network

CLASSES = ["001.Black_Gull", "002.White_Gull"]
CLASS_P = np.array([0, 0, 1, 1])

# ------------------------------------------------------------------------------------------------- close pairs


def brute_force_pairs(
    vectors: torch.Tensor, classes: np.ndarray, reach: np.ndarray, within: float, across: float
) -> set:
    found = set()
    for a in range(len(classes)):
        for b in range(a + 1, len(classes)):
            relative = float((vectors[a].double() - vectors[b].double()).square().sum()) / min(reach[a], reach[b])
            if relative <= (within if classes[a] == classes[b] else across):
                found.add((a, b))
    return found


@given(seed=st.integers(0, 2**32), block=st.sampled_from([1, 40, 1000]))
@settings(max_examples=30, deadline=None)
def test_close_pairs_are_those_of_brute_force_whatever_the_block(seed: int, block: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, NEIGHBOURS + 2))  # so few that each may keep all its neighbours
    vectors = torch.from_numpy(random.integers(0, 4, (count, 3, 1, 1)).astype(np.float32) / 4)
    classes, reach = random.integers(0, 3, count), random.uniform(0.1, 1, count)
    pairs = close_pairs(vectors, classes, reach, "log", within_class=0.6, across_classes=0.9, numbers=block)
    named = list(zip(pairs["prototype"].to_pylist(), pairs["other"].to_pylist(), strict=True))
    assert set(named) == brute_force_pairs(vectors, classes, reach, 0.6, 0.9)
    assert len(set(named)) == len(named)
    assert pairs["relative_distance"].to_pylist() == sorted(pairs["relative_distance"].to_pylist())
    for a, b, same, distance in zip(
        *(pairs[n].to_pylist() for n in ("prototype", "other", "same_class", "distance")), strict=True
    ):
        assert same == (classes[a] == classes[b])
        assert distance == pytest.approx(float((vectors[a] - vectors[b]).square().sum()), abs=1e-6)


def test_of_many_equal_prototypes_each_keeps_a_few_neighbours() -> None:
    pairs = close_pairs(
        torch.ones(60, 2, 1, 1), np.zeros(60, int), np.ones(60), "log", within_class=0.1, across_classes=1
    )
    assert 60 * NEIGHBOURS / 2 <= len(pairs) <= 60 * NEIGHBOURS


# --------------------------------------------------------------------------------------------------------- use

CONNECTIONS = np.array([[1.0, 1.0, -1.0, 0.5], [0.0, 0.0, 2.0, 1.0]])


def seen(similarities: list[list[float]]) -> Output:
    similarities_BP = torch.tensor(similarities)
    logits_BK = similarities_BP @ torch.tensor(CONNECTIONS, dtype=torch.float32).t()
    return Output(logits_BK, 1 - similarities_BP, similarities_BP)


# Points for class 0: 4 2 -1 0; for class 1: 0 0 2 0. Then 0 1 -3 .5 and 0 0 6 1. Then 0 1 -1 1 and 0 0 2 2.
BATCH = [[4.0, 2.0, 1.0, 0.0], [0.0, 1.0, 3.0, 1.0], [0.0, 1.0, 1.0, 2.0]]
LABELS = np.array([0, 0, 1])


def test_use_on_a_hand_made_batch() -> None:
    use = use_of_batch(seen(BATCH), CONNECTIONS, CLASS_P, LABELS, top=2)
    assert use.images == 3
    assert use.first_P.tolist() == [1, 0, 2, 0]  # of equal points the first prototype
    assert use.top_P.tolist() == [1, 1, 2, 2]
    assert use.predicted_K.tolist() == [1, 2]
    assert use.points_P.tolist() == [4, 2, 8, 3]
    assert use.right_K.tolist() == [1, 1]
    assert use.own_points_K.tolist() == [7, 4]
    assert use.other_points_K.tolist() == [0.5, 0]
    assert use.against_K.tolist() == [-4, 0]
    assert use.own_distance_P.tolist() == [-2, -1, 0, -1]
    assert dict(use.errors) == {(2, 0): 1}


def test_prototypes_without_points_are_no_evidence() -> None:
    use = use_of_batch(seen([[0.0, 0.0, 0.0, 0.0]]), CONNECTIONS, CLASS_P, np.array([1]), top=4)
    assert not use.top_P.any()
    assert not use.first_P.any()
    assert not use.errors


@given(seed=st.integers(0, 2**32), cut=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_use_adds_up_however_the_images_are_cut(seed: int, cut: int) -> None:
    random = np.random.default_rng(seed)
    similarities, labels = random.random((10, 4)), random.integers(0, 2, 10)
    whole = use_of_batch(seen(similarities.tolist()), CONNECTIONS, CLASS_P, labels, top=2)
    parts = [
        use_of_batch(seen(similarities[part].tolist()), CONNECTIONS, CLASS_P, labels[part], top=2)
        for part in (slice(None, cut), slice(cut, None))
    ]
    travelled = Use.from_table(pa.concat_tables([part.to_table() for part in parts]))
    for total in (parts[0] + parts[1], travelled, Use.nothing(4, 2) + whole):
        for name in vars(whole):
            if name != "errors":
                np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-9, atol=1e-12)
        assert dict(total.errors) == dict(whole.errors)


def test_a_class_without_images_has_the_reach_of_the_others() -> None:
    use = replace(Use.nothing(4, 2), own_distance_P=np.array([2.0, 4.0, 0, 0]), images_K=np.array([2.0, 0]))
    assert use.reach(CLASS_P).tolist() == [1, 2, 1.5, 1.5]


# ----------------------------------------------------------------------------------------------------- patches


def points(*places: tuple[float, float]) -> list[dict]:
    return [{"part": f"part {n}", "x": x, "y": y} for n, (x, y) in enumerate(places)]


class TestOnObject:
    square = points((0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8), (0.5, 0.5))

    def test_within_the_outline_and_near_a_key_point(self) -> None:
        places = np.array([(0.5, 0.3), (0.85, 0.85), (0.5, 0.95), (0.05, 0.5)])  # within, near a corner, outside twice
        assert share_on_object(places, self.square) == 0.5

    def test_without_an_outline_it_is_not_known(self) -> None:
        places = np.array([(0.5, 0.5)])
        assert share_on_object(places, None) is None
        assert share_on_object(places, points((0.1, 0.1), (0.9, 0.9))) is None
        assert share_on_object(places, points((0.1, 0.1), (0.5, 0.5), (0.9, 0.9))) is None

    def test_what_is_most_active_is_where_the_map_peaks(self) -> None:
        peak = torch.zeros(1, 7, 7)
        peak[0, 1, 5] = 1.0
        places = most_active(peak)[0]
        assert len(places) == pytest.approx(0.05 * 48 * 48, rel=0.1)
        assert np.abs(places - (5.5 / 7, 1.5 / 7)).max() < 1.1 / 7


def jpeg(colour: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(sink, "JPEG")
    return sink.getvalue()


def prototypes() -> pa.Table:
    peak = np.eye(4).tolist()
    rows = [
        {
            "prototype": p,
            "class": label,
            "class_name": CLASSES[label],
            "image_id": p,
            "uri": f"s3://bucket/{p}.jpg",
            "sha256": f"sha {p}",
            "width": 120,
            "height": 80,
            "row": 1,
            "column": 2,
            "box": [10, 20, 30, 60],
            "receptive_field": [0, 0, 80, 120],
            "self_similarity": 9.0,
            "activation_map": peak,
            "thumbnail": jpeg("seagreen"),
        }
        for p, label in enumerate(CLASS_P.tolist())
    ]
    return pa.Table.from_pylist(rows, PROTOTYPE_SCHEMA)


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


# ---------------------------------------------------------------------------------------------------- remedies


def flagging(kind: str, *prototypes: int) -> Finding:
    return Finding(1, kind, 0, prototypes, "")


def test_of_repeated_prototypes_the_first_stays() -> None:
    [remedy] = remedies([flagging("repeated", 0, 1), flagging("borrowed")], prototypes())
    assert (remedy.kind, remedy.says, remedy.options) == ("repeated", "drops 1 prototype", "--remove 1")


def test_no_class_is_left_without_a_prototype() -> None:
    assert prototypes()["class"].to_pylist() == [0, 0, 1, 1]
    [remedy] = remedies([flagging("unused", 1), flagging("unused", 0), flagging("unused", 3)], prototypes())
    assert remedy.options == "--remove 1,3"
    assert remedies([flagging("unused", 2)], prototypes().filter(pa.array([True, True, True, False]))) == []


def test_what_looks_at_the_background_is_moved_and_the_command_can_be_typed() -> None:
    named = prototypes()
    uris = pa.array(["a/b c's.jpg", *named["uri"].to_pylist()[1:]])
    named = named.set_column(named.column_names.index("uri"), "uri", uris)
    [remedy] = remedies([flagging("background", 0)], named)
    box = ",".join(map(str, named["box"].to_pylist()[0]))
    assert shlex.split(remedy.options) == ["--forbid", f"a/b c's.jpg:{box}"]


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
