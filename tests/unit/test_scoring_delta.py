"""`--format delta`: the parts are a table of Delta Lake once all of them are there, and every row is in it once."""

import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from protopnet.errors import UserError
from protopnet.evidence.every import Asked
from protopnet.scoring.arrays import array_fields
from protopnet.scoring.delta import commit
from protopnet.scoring.output import score_schema, take_stock, write_chunk
from protopnet.scoring.tally import Tally

ARRAYS = array_fields(Asked([pa.array([0, 1]).to_numpy()], [(2, 2)]), "delta")
SCHEMA = score_schema(False, ["patient"], ARRAYS)
NAMES = ["a/b", "50 %", "ü", "c=d", "01", None]


def chunk(folder: Path, number: int, rows: int = 6, by: str | None = None) -> pa.Table:
    made = [
        {
            "image_id": 10 * number + row,
            "class_name": NAMES[row % 6],
            "top": [{"class": 1, "class_name": "x", "probability": 0.5, "logit": 1.0}] if row else None,
            "similarities": [0.5, 1.0] if row else None,
            "boxes": [[0, 1, 2, 3]] * 2 if row else None,
            "maps": [0.25 * row] * 8 if row else None,
        }
        for row in range(rows)
    ]
    table = pa.Table.from_pylist(made, SCHEMA)
    write_chunk(str(folder), number, table, Tally(images=rows), partition_by=by, about={})
    return table


def ids(folder: Path) -> list[int]:
    return sorted(DeltaTable(folder / "parts").to_pyarrow_table()["image_id"].to_pylist())


@pytest.mark.parametrize("by", [None, "class_name"])
def test_the_table_has_every_row_once(tmp_path: Path, by: str | None) -> None:
    tables = [chunk(tmp_path, number, by=by) for number in range(2)]
    assert not DeltaTable.is_deltatable(str(tmp_path / "parts"))  # a job that was killed here shows nothing
    commit(str(tmp_path))
    table = DeltaTable(tmp_path / "parts")
    assert table.version() == 0  # one commit: no reader finds it empty
    assert table.count() == 12  # from what the log says of each file
    found, expected = table.to_pyarrow_table().sort_by("image_id"), pa.concat_tables(tables)
    assert found.to_pylist() == expected.to_pylist()
    by_duckdb = duckdb.from_arrow(table.to_pyarrow_dataset()).filter("maps[1] = 0.5").select("class_name").fetchall()
    assert by_duckdb == [("ü",)] * 2
    assert take_stock(str(tmp_path))[0] == {0, 1}  # the log isn't taken for a part


def test_what_is_there_is_left_and_what_is_new_is_added(tmp_path: Path) -> None:
    chunk(tmp_path, 0)
    commit(str(tmp_path))
    commit(str(tmp_path))
    assert DeltaTable(tmp_path / "parts").version() == 0
    chunk(tmp_path, 1)
    assert ids(tmp_path) == [0, 1, 2, 3, 4, 5]  # readers have what was whole
    commit(str(tmp_path))
    assert ids(tmp_path) == [*range(6), *range(10, 16)]


def test_a_part_that_was_made_again_takes_its_own_place(tmp_path: Path) -> None:
    chunk(tmp_path, 0)
    chunk(tmp_path, 1)
    commit(str(tmp_path))
    chunk(tmp_path, 1, rows=5)
    commit(str(tmp_path))
    assert ids(tmp_path) == [*range(6), *range(10, 15)]
    assert DeltaTable(tmp_path / "parts").count() == 11


def test_maps_are_whole_floats(tmp_path: Path) -> None:
    table = chunk(tmp_path, 0)
    assert table["maps"].type == pa.list_(pa.float32(), 8)
    commit(str(tmp_path))
    maps = DeltaTable(tmp_path / "parts").to_pyarrow_table()["maps"]
    assert pc.list_value_length(maps).to_pylist() == [None, 8, 8, 8, 8, 8]


def test_a_log_that_is_no_log_is_one_line(tmp_path: Path) -> None:
    chunk(tmp_path, 0)
    commit(str(tmp_path))
    [log] = (tmp_path / "parts/_delta_log").glob("*.json")
    log.write_text("nonsense")
    with pytest.raises(UserError, match="can't be written .*same command"):
        commit(str(tmp_path))


def test_without_the_library_it_is_said_at_once() -> None:
    code = "import sys; sys.modules['deltalake'] = None\nfrom protopnet.scoring.delta import check_installed as c; c()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'protopnet[delta]'" in done.stderr
