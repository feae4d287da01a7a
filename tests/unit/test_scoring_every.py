"""`--explain all`: every prototype's similarity, place, box and map, as arrays of a row."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
import torch
from serving import CLASSES, SIZE, make_bundle, photo, pixels

from protopnet.cli import parse
from protopnet.errors import UserError
from protopnet.evidence.every import Asked
from protopnet.imaging import BadImage
from protopnet.predictor import Predictor
from protopnet.scoring.arrays import NAMES, rows_at_most
from protopnet.scoring.job import ScoreSettings
from protopnet.scoring.manifest import MANIFEST_SCHEMA
from protopnet.scoring.output import write_chunk
from protopnet.scoring.record import default_chunk_rows
from protopnet.scoring.tally import Agreement, Tally
from protopnet.scoring.task import Picture, ScoreOptions, Scorer, look

CPU = torch.device("cpu")
WIDTHS = [90, 40, 120]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("bundles")
    return Predictor.load([make_bundle(folder / str(seed), seed) for seed in range(2)]).to(CPU)


def rows(predictor: Predictor, *bad: BadImage, **options: object) -> pa.Table:
    seen: list[Picture | BadImage] = [look(photo(n, width=w), {}, [SIZE], 10**6) for n, w in enumerate(WIDTHS)]
    seen = [*bad, *seen]
    count = len(seen)
    names = [f"{n}.jpg" for n in range(count)]
    manifest = pa.table([range(count), names, names, [-1] * count, [-1] * count, [0] * count], schema=MANIFEST_SCHEMA)
    table, _ = Scorer(predictor, ScoreOptions(batch_size=4, **options), CPU)(manifest, seen)  # type: ignore[arg-type]
    table.validate(full=True)
    return table


def array(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist())


def test_arrays_are_those_of_an_explanation(pair: Predictor) -> None:
    table = rows(pair, explain="all")
    inputs = pixels(*(photo(n, width=width) for n, width in enumerate(WIDTHS)), photo(9))
    sizes = [*((width, 60) for width in WIDTHS), (90, 60)]
    options = {"top_classes": 1, "top_prototypes": 100, "maps": True, "map": "similarity"}
    explained = pair.explain(inputs, sizes, **options)[:3]  # type: ignore[arg-type]
    of_image = [sorted(e.top.evidence, key=lambda e: (e.member, e.prototype)) for e in explained]
    assert {len(entries) for entries in of_image} == {24}
    np.testing.assert_allclose(array(table, "similarities"), [[e.similarity for e in es] for es in of_image], rtol=1e-4)
    np.testing.assert_allclose(array(table, "points"), [[e.points for e in es] for es in of_image], rtol=1e-4)
    assert array(table, "places").tolist() == [[[e.row, e.column] for e in es] for es in of_image]
    assert array(table, "boxes").tolist() == [[list(e.box) for e in es] for es in of_image]
    maps = np.array([[e.activation_map for e in es] for es in of_image])
    np.testing.assert_allclose(array(table, "maps").reshape(maps.shape), maps, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(array(table, "points").sum(1), table["logit"], rtol=1e-4)
    assert table.drop_columns(NAMES).equals(rows(pair))


def test_only_what_is_asked_for(pair: Predictor) -> None:
    whole = rows(pair, explain="all")
    options = {"explain": "all", "explain_classes": [CLASSES[1]], "explain_prototypes": [11, 0]}
    table, chosen = rows(pair, **options), [0, 3, 4, 5, 11]
    asked = ScoreOptions(**options).asked(pair)  # type: ignore[arg-type]
    assert asked is not None
    assert asked.described() == [{"member": member, "prototypes": chosen, "map": [8, 8]} for member in range(2)]
    both = np.array([*chosen, *(12 + number for number in chosen)])
    for name in ("similarities", "points", "places", "boxes"):
        assert array(table, name).tolist() == array(whole, name)[:, both].tolist(), name
    cells = array(whole, "maps").reshape(3, 24, 64)[:, both]
    assert array(table, "maps").tolist() == cells.reshape(3, -1).tolist()


def test_arrays_come_back_from_files(pair: Predictor, tmp_path: Path) -> None:
    table = rows(pair, BadImage("gone"), explain="all", explain_prototypes=[2])
    assert all(table[name].to_pylist()[0] is None for name in NAMES)
    assert table["maps"].type == pa.list_(pa.float16(), 2 * 64)
    write_chunk(str(tmp_path), 0, table, Tally.of(table, Agreement()), partition_by="class_name", about={})
    assert pads.dataset(str(tmp_path / "parts")).to_table().sort_by("image_id").equals(table)
    found = duckdb.sql(
        f"select similarities, boxes, maps from '{tmp_path}/parts/*/*.parquet' order by image_id"
    ).fetchall()
    assert found[0] == (None, None, None)
    for row, expected in zip(found[1:], table.to_pylist()[1:], strict=True):
        assert [list(row[0]), [list(box) for box in row[1]], list(row[2])] == [
            expected["similarities"],
            expected["boxes"],
            expected["maps"],
        ]


def test_what_would_be_too_large_is_refused_with_its_size() -> None:
    most = rows_at_most(Asked([np.arange(2000)], [(7, 7)]))
    assert most * 2000 * (28 + 2 * 49) <= 256e6 < (most + 1) * 2000 * (28 + 2 * 49)
    assert default_chunk_rows(10**6, 1, 64, most) == 960
    assert default_chunk_rows(10**6, 1, 64, 10) == 64
    with pytest.raises(UserError, match=r"12,600,000 bytes \(100,000 prototypes, 4,900,000 cells.*--explain_classes"):
        rows_at_most(Asked([np.arange(100_000)], [(7, 7)]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"explain": 3, "explain_prototypes": [1]}, "give that, too"),
        ({"explain": "all", "explain_prototypes": [12]}, "every member has prototypes 0 to 11"),
        ({"explain": "all", "explain_classes": ["Robin"]}, "no class 'Robin'"),
    ],
)
def test_what_there_is_not_is_refused(pair: Predictor, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ScoreOptions(**options).asked(pair)  # type: ignore[arg-type]


def test_a_baseline_has_none(tmp_path: Path) -> None:
    baseline = Predictor.load([make_bundle(tmp_path / "b", 0, kind="baseline")])
    with pytest.raises(UserError, match="can't explain"):
        ScoreOptions(explain="all").asked(baseline)


def test_the_command_line_says_so() -> None:
    words = (
        "--bundle=b --input=i --output=o --explain=all --explain_classes=A,B --explain_classes=C --explain_prototypes=3"
    )
    settings = parse(ScoreSettings, words.split())
    assert (settings.explain, settings.explain_classes, settings.explain_prototypes) == ("all", ["A,B", "C"], [3])
    with pytest.raises(UserError, match="explain"):
        parse(ScoreSettings, ["--bundle=b", "--input=i", "--output=o", "--explain=some"])
