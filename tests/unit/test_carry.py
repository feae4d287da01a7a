"""Columns of a list that are carried through to the scores."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from serving import photo

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.imaging import BadImage
from protopnet.model.bundle import load_bundle, save_bundle
from protopnet.model.network import build_network
from protopnet.predictor import Predictor
from protopnet.scoring.inputs import open_input
from protopnet.scoring.job import ScoreSettings
from protopnet.scoring.manifest import contents_of
from protopnet.scoring.output import is_done, take_stock, write_chunk
from protopnet.scoring.record import JobRecord, begin, resume
from protopnet.scoring.task import ScoreOptions, Scorer, look

CARRY = ["Patient", "age"]


def a_list(folder: Path, suffix: str, number: int = 5) -> str:
    """The third image can't be read, the fourth has no patient."""
    for place in range(number):
        (folder / f"{place}.jpg").write_bytes(b"nothing" if place == 2 else photo(place))
    patients = ["" if place == 3 else f"P{place}" for place in range(number)]
    if suffix == ".parquet":
        given = {"age": pa.array(range(40, 40 + number)), "Patient": patients}
        pq.write_table(pa.table({"uri": [f"{n}.jpg" for n in range(number)], **given}), folder / "list.parquet")
        return str(folder / "list.parquet")
    lines = [f"{40 + place},{place}.jpg,{patients[place]}" for place in range(number)]
    (folder / "list.csv").write_text("\n".join(["age,uri,Patient", *lines]))
    return str(folder / "list.csv")


def begun(folder: Path, source: str) -> JobRecord:
    asked = {"bundles": ["aa"], "settings": {"chunk_rows": 2, "batch_size": None, "carry": CARRY}}
    opened = open_input(source, CARRY)
    found = resume(str(folder), opened, **asked)  # type: ignore[arg-type]
    return found[0] if found else begin(str(folder), opened, **asked, classes=[], batch_size=2, actors=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_they_go_with_their_images_through_a_job_that_was_killed(tmp_path: Path, suffix: str) -> None:
    source, output = a_list(tmp_path, suffix), tmp_path / "out"
    model = ModelSettings(backbone="resnet18", image_size=32, prototypes=2)
    save_bundle(str(tmp_path / "b"), build_network(model, 2, start_weights=False), model, ["a", "b"], {})
    predictor = Predictor([load_bundle(str(tmp_path / "b"))])
    scorer = Scorer(predictor, ScoreOptions(batch_size=2, carry=CARRY), torch.device("cpu"))

    def work(chunks: list[int]) -> None:
        record = begun(output, source)
        assert record.chunks == 3
        for chunk in chunks:
            if not is_done(str(output), chunk):
                rows = record.rows(str(output / "job"), chunk)
                seen = [look(Path(uri).read_bytes(), {}, predictor.sizes, 10**6) for uri in rows["file"].to_pylist()]
                table, tally = scorer(rows, seen)
                write_chunk(str(output), chunk, table, tally, partition_by=None, about={})

    work([0])  # and then it was killed
    work([0, 1, 2])
    assert take_stock(str(output))[1].images == 5
    found = pa.concat_tables([pq.read_table(file) for file in sorted((output / "parts").rglob("*.parquet"))])
    assert found.column_names[-2:] == CARRY
    assert [Path(uri).stem for uri in found["uri"].to_pylist()] == list("01234")
    assert found["Patient"].to_pylist() == ["P0", "P1", "P2", "", "P4"]
    assert found["age"].to_pylist() == ["40", "41", "42", "43", "44"]
    assert [error is None for error in found["error"].to_pylist()] == [True, True, False, True, True]


def test_without_carrying_nothing_changes(tmp_path: Path) -> None:
    source = a_list(tmp_path, ".csv")
    (table,) = open_input(source).tables()
    assert "carried" not in table.column_names
    assert contents_of(open_input(source).tables()) == contents_of(open_input(source, CARRY).tables())
    assert isinstance(look(b"", {}, [32], 1), BadImage)


def test_what_cannot_be_carried_is_said(tmp_path: Path) -> None:
    source = a_list(tmp_path, ".csv")
    with pytest.raises(UserError, match="has no column sex; its columns are age, uri, Patient"):
        list(open_input(source, ["sex"]).tables())
    with pytest.raises(UserError, match=r"is no list with columns \(--carry\)"):
        open_input(str(tmp_path), ["age"])
    for carry in (["uri"], ["age", "age"]):
        with pytest.raises(ValidationError, match="is a column of the scores already"):
            ScoreSettings(bundle=["b"], input=source, output="o", carry=carry)
