"""What a row says of an image, and the files of a chunk."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import CLASSES, SIZE, make_bundle, photo, pixels

from protopnet.errors import UserError
from protopnet.imaging import BadImage
from protopnet.predictor import Predictor
from protopnet.scoring.manifest import MANIFEST_SCHEMA
from protopnet.scoring.output import clear_unfinished, is_done, score_schema, take_stock, write_chunk
from protopnet.scoring.tally import Agreement, Tally
from protopnet.scoring.task import Picture, ScoreOptions, Scorer, look

CPU = torch.device("cpu")
WIDTHS = [90, 40, 120, 64, 200, 77, 51]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [make_bundle(tmp_path_factory.mktemp("bundles") / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def ensemble(members: list[str]) -> Predictor:
    return Predictor.load(members).to(CPU)


def manifest(count: int) -> pa.Table:
    names = [f"{n}.jpg" for n in range(count)]
    labels = [None if n == 2 else n % 4 for n in range(count)]
    return pa.table([range(count), names, names, [-1] * count, [-1] * count, labels], schema=MANIFEST_SCHEMA)


def pictures() -> list[Picture | BadImage]:
    return [look(photo(n, width=width), {}, [SIZE], 10**6) for n, width in enumerate(WIDTHS)]


def rows(predictor: Predictor, seen: list[Picture | BadImage] | None = None, **options: object) -> pa.Table:
    seen = pictures() if seen is None else seen
    scorer = Scorer(predictor, ScoreOptions(**({"batch_size": 8} | options)), CPU)  # type: ignore[arg-type]
    table, _ = scorer(manifest(len(seen)), seen)
    table.validate(full=True)
    return table


def test_a_row_says_what_the_predictor_says(ensemble: Predictor) -> None:
    table = rows(ensemble, top=4)
    scores = ensemble.scores(pixels(*(photo(n, width=width) for n, width in enumerate(WIDTHS))), pad_to=8)
    order = scores.logits_BK.sort(dim=1, descending=True, stable=True)
    assert table["prediction"].to_pylist() == order.indices[:, 0].tolist()
    assert table["logit"].to_pylist() == order.values[:, 0].tolist()
    top = table["top"].to_pylist()
    assert [[entry["class"] for entry in row] for row in top] == order.indices.tolist()
    assert [[entry["logit"] for entry in row] for row in top] == order.values.tolist()
    assert all(entry["class_name"] == CLASSES[entry["class"]] for row in top for entry in row)
    probabilities = np.array([[entry["probability"] for entry in row] for row in top])
    np.testing.assert_allclose(probabilities, scores.logits_BK.softmax(1).sort(1, descending=True)[0], rtol=1e-5)
    np.testing.assert_allclose(table["margin"], probabilities[:, 0] - probabilities[:, 1], atol=1e-6)
    agree = (scores.members_MBK.argmax(2) == order.indices[:, 0]).float().mean(0)
    np.testing.assert_allclose(table["members_agree"], agree)
    assert table["class_name"].to_pylist() == [CLASSES[label] for label in order.indices[:, 0].tolist()]
    assert table["width"].to_pylist() == WIDTHS
    assert set(table["height"].to_pylist()) == {60}
    assert table["label_name"].to_pylist() == [None if n == 2 else CLASSES[n % 4] for n in range(7)]


def test_logits_of_an_ensemble_are_the_sum_of_its_members(ensemble: Predictor, members: list[str]) -> None:
    def logits(predictor: Predictor) -> np.ndarray:
        listed = rows(predictor, top=4)["top"].to_pylist()
        return np.array([[e["logit"] for e in sorted(row, key=lambda e: e["class"])] for row in listed], np.float32)

    alone = [logits(Predictor.load([member]).to(CPU)) for member in members]
    np.testing.assert_array_equal(logits(ensemble), torch.from_numpy(np.stack(alone)).sum(0).numpy())


def test_evidence_is_that_of_an_explanation(ensemble: Predictor) -> None:
    table, plain = rows(ensemble, explain=4), rows(ensemble)
    assert table.drop_columns(["evidence"]).equals(plain)
    inputs = pixels(*(photo(n, width=width) for n, width in enumerate(WIDTHS)))
    inputs = torch.cat([inputs, torch.zeros_like(inputs[:1])]).contiguous(memory_format=torch.channels_last)
    explained = ensemble.explain(inputs, [*((w, 60) for w in WIDTHS), (1, 1)], top_classes=1, top_prototypes=4)
    for row, expected in zip(table["evidence"].to_pylist(), explained, strict=False):
        assert row == [
            {
                "member": e.member,
                "prototype": e.prototype,
                "class": e.class_,
                "name": e.name,
                "similarity": pytest.approx(e.similarity),
                "connection": pytest.approx(e.connection),
                "points": pytest.approx(e.points),
                "box": list(e.box),
                "source_uri": e.source and e.source.uri,
            }
            for e in expected.top.evidence
        ]
    assert "red bill" in {entry["name"] for row in table["evidence"].to_pylist() if row for entry in row}


def test_all_prototypes_together_are_the_logit(ensemble: Predictor) -> None:
    table = rows(ensemble, explain=1000)
    points = [sum(entry["points"] for entry in row) for row in table["evidence"].to_pylist()]
    assert len(table["evidence"][0]) == 3 * 12
    np.testing.assert_allclose(points, table["logit"], rtol=1e-5)


def test_scores_do_not_depend_on_the_company(ensemble: Predictor) -> None:
    seen, whole = pictures(), rows(ensemble, explain=2)
    for n in range(len(seen)):
        alone = rows(ensemble, seen[n : n + 1], explain=2)
        assert alone.drop_columns(["image_id", "uri", "label", "label_name"]).equals(
            whole.slice(n, 1).drop_columns(["image_id", "uri", "label", "label_name"])
        )


def test_a_bad_image_is_a_row_with_nothing_but_its_reason(ensemble: Predictor) -> None:
    seen: list[Picture | BadImage] = [*pictures()[:3], look(b"", {}, [SIZE], 10**6), look(photo(), {}, [SIZE], 100)]
    seen.insert(1, BadImage("can't be read: gone"))
    table = rows(ensemble, seen, explain=1)
    errors = table["error"].to_pylist()
    assert errors[1] == "can't be read: gone"
    assert errors[4:] == ["the file is empty", "90 x 60 pixels are more than max_pixels (100)"]
    for row in table.filter(pc.is_valid(table["error"])).to_pylist():
        assert {name for name, value in row.items() if value is not None} <= {
            *("image_id", "uri", "label", "label_name", "error")
        }
    good = table.filter(pc.is_null(table["error"]))
    assert all(
        column.null_count == 0
        for name in good.column_names
        if name not in ("label", "label_name", "unknown", "error")
        for column in [good[name]]
    )
    nothing = rows(ensemble, [BadImage("a"), BadImage("b")], explain=1)
    assert nothing["error"].to_pylist() == ["a", "b"]
    assert nothing["top"].null_count == 2


@pytest.mark.parametrize("by", ["probability", "margin"])
def test_abstaining_takes_the_prediction_and_nothing_else(ensemble: Predictor, by: str) -> None:
    plain = rows(ensemble)
    threshold = float(np.median(plain[by]))
    table = rows(ensemble, abstain=threshold, abstain_by=by)
    sure = np.array(plain[by]) >= threshold
    assert 0 < sure.sum() < len(sure)
    for name in table.column_names:
        expected = plain[name].to_pylist()
        if name in ("prediction", "class_name"):
            expected = [value if keep else None for value, keep in zip(expected, sure, strict=True)]
        assert table[name].to_pylist() == expected, name
    assert Tally.of(table, Agreement()).abstained == (~sure).sum()


def test_bf16_is_measured_against_float32(ensemble: Predictor) -> None:
    scorer = Scorer(ensemble, ScoreOptions(batch_size=8, precision="bf16"), CPU)
    table, tally = scorer(manifest(7), pictures())
    agreement = tally.agreement
    exact = rows(ensemble)
    same = pc.sum(pc.equal(table["prediction"], exact["prediction"])).as_py()
    assert (agreement.images, agreement.same_prediction) == (7, same)
    apart = np.abs(np.array(table["logit"]) - np.array(exact["logit"]))[
        np.array(pc.equal(table["prediction"], exact["prediction"]))
    ]
    assert 0 < apart.max() <= agreement.largest_logit_difference + 1e-6
    assert Scorer(ensemble, ScoreOptions(batch_size=8), CPU)(manifest(7), pictures())[1].agreement == Agreement()


def test_scores_that_are_no_numbers_are_an_error(members: list[str]) -> None:
    broken = Predictor.load(members[:1]).to(CPU)
    with torch.no_grad():
        broken.bundles[0].network.last_layer.weight[1, 0] = float("nan")  # type: ignore[union-attr, index]
    table = rows(broken, explain=1)
    assert set(table["error"].to_pylist()) == {"the network's scores aren't finite numbers"}
    assert table["prediction"].null_count == 7


def test_a_baseline_scores_but_does_not_explain(tmp_path: Path) -> None:
    baseline = Predictor.load([make_bundle(tmp_path / "b", 0, kind="baseline")]).to(CPU)
    assert rows(baseline)["prediction"].null_count == 0
    with pytest.raises(UserError, match="can't explain"):
        rows(baseline, explain=1)


# Counts


counts = st.dictionaries(st.sampled_from("abc"), st.integers(1, 9))
tallies = st.builds(
    Tally,
    images=st.integers(0, 99),
    abstained=st.integers(0, 9),
    labelled=st.integers(0, 9),
    correct=st.integers(0, 9),
    errors=counts,
    predictions=counts,
    agreement=st.builds(Agreement, images=st.integers(0, 9), same_prediction=st.integers(0, 9)),
)


@given(tallies, tallies, tallies)
def test_counts_may_be_added_in_any_order(a: Tally, b: Tally, c: Tally) -> None:
    assert a.plus(b).plus(c) == c.plus(a.plus(b)) == b.plus(c.plus(a))
    assert a.plus(Tally()) == a


def test_rows_are_counted(ensemble: Predictor) -> None:
    seen = [*pictures()[:5], BadImage("damaged or cut off: 12 bytes"), BadImage("damaged or cut off: 3 bytes")]
    seen[4] = BadImage("900 x 60 pixels are more than max_pixels (100)")
    table = rows(ensemble, seen)
    tally = Tally.of(table, Agreement())
    right = [row["prediction"] == row["label"] for row in table.to_pylist()[:4] if row["label"] is not None]
    assert (tally.images, tally.bad, tally.abstained, tally.labelled) == (7, 3, 0, 3)
    assert tally.correct == sum(right)
    assert tally.errors == {"damaged or cut off": 2, "… x … pixels are more than max_pixels": 1}
    assert sum(tally.predictions.values()) == 4
    assert Tally.of(table.slice(5), Agreement()).accuracy is None


# Files


def write(folder: Path, table: pa.Table, chunk: int = 0, by: str | None = None) -> None:
    write_chunk(str(folder), chunk, table, Tally.of(table, Agreement()), partition_by=by, about={"bundles": ["ab"]})


def test_a_part_says_what_it_is(ensemble: Predictor, tmp_path: Path) -> None:
    table = rows(ensemble, explain=2)
    write(tmp_path, table, 12)
    file = pq.ParquetFile(tmp_path / "parts/part-00012.parquet")
    about = json.loads(file.schema_arrow.metadata[b"protopnet"])
    assert (about["format"], about["version"], about["chunk"], about["bundles"]) == ("protopnet-scores", 2, 12, ["ab"])
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.schema_arrow.remove_metadata().equals(score_schema(evidence=True))
    assert file.read().equals(table)


@pytest.mark.parametrize("column", ["class_name", "prediction", "label", "label_name"])
def test_partitions_hold_every_row_once(ensemble: Predictor, tmp_path: Path, column: str) -> None:
    table = rows(ensemble, [*pictures()[:6], BadImage("x")], explain=1)
    write(tmp_path, table, by=column)
    folders = {folder.name for folder in (tmp_path / "parts").iterdir()}
    assert len(folders) == len(set(table[column].to_pylist()))
    assert pads.dataset(str(tmp_path / "parts")).to_table().sort_by("image_id").equals(table)


@pytest.mark.parametrize(
    "names",
    [
        ["a/b", "c=d", "50 %", "ü", "e'f\"", "g:h", None],
        ["01", "123", "1e3", "0x10", "99999999999999999999", "-1", "01"],
        ["2024-01-01", "true", "null", "NaN", "", " x ", None],
        ["_hidden", ".hidden", "..", "a\nb", "__HIVE_DEFAULT_PARTITION__", "without-class_name", None],
    ],
)
def test_names_of_partitions_come_back_as_they_are(
    tmp_path: Path, ensemble: Predictor, names: list[str | None]
) -> None:
    table = rows(ensemble)
    at = table.column_names.index("class_name")
    table = table.set_column(at, "class_name", pa.array(names))
    write(tmp_path, table, by="class_name")
    parts = tmp_path / "parts"
    assert pads.dataset(str(parts)).to_table().sort_by("image_id")["class_name"].to_pylist() == names
    by_duckdb = duckdb.sql(f"select class_name from '{parts}/*/*.parquet' order by image_id").fetchall()
    assert [name for (name,) in by_duckdb] == names
    by_pandas = pandas.read_parquet(parts).sort_values("image_id")["class_name"]
    assert [None if pandas.isna(name) else name for name in by_pandas] == names


@pytest.mark.parametrize("by", [None, "class_name"])
def test_what_belongs_to_no_finished_chunk_is_taken_away(ensemble: Predictor, tmp_path: Path, by: str | None) -> None:
    table = rows(ensemble)
    write(tmp_path, table, 0, by)
    write(tmp_path, table, 1, by)
    half = tmp_path / "parts" / ("class_name-gone" if by else "") / "part-00002.parquet"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    (half.parent / ".part-00003.parquet.abc.unfinished").write_bytes(b"ha")
    (tmp_path / "parts" / "README").write_text("mine")
    done, total = take_stock(str(tmp_path))
    clear_unfinished(str(tmp_path))
    assert (done, total.images) == ({0, 1}, 14)
    assert not half.exists()
    assert not list(tmp_path.rglob("*.unfinished"))
    assert (tmp_path / "parts" / "README").exists()

    next(tmp_path.glob("parts/**/part-00001.parquet")).unlink()  # somebody wants it made again
    done, total = take_stock(str(tmp_path))
    assert (done, total.images) == ({0}, 7)
    assert not list(tmp_path.glob("parts/**/part-00001.parquet"))
    assert not is_done(str(tmp_path), 1)
    assert is_done(str(tmp_path), 0)
