"""Shards: written once, in a drawn order, whole or not at all; and the reader of their images."""

import hashlib
import json
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from flowers import FOLDER, check_rows, flowers, images_of, jpeg, scan

from protopnet import storage
from protopnet.config import BirdSettings, DataSettings, PrepareSettings, RunSettings
from protopnet.datasets import open as open_module
from protopnet.datasets.open import open_dataset, open_source
from protopnet.datasets.pool import ordered
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import ROW_SCHEMA, BadRow, Dataset
from protopnet.datasets.shards import open_shards, write_shards, write_source
from protopnet.datasets.validate import check_dataset
from protopnet.datasets.writer import Limits
from protopnet.errors import UserError
from protopnet.imaging import BadImage

PREPARE = Path(__file__).parents[2] / "jobs/prepare.py"
TINY = Limits(group_rows=3, group_bytes=10_000, file_bytes=4_000, index_rows=5)


def packed(tmp_path: Path, **options: Any) -> tuple[Dataset, Dataset]:
    """A folder, and the same folder as many small shards."""
    settings = PrepareSettings(
        output="-", data=DataSettings(source="folder", path=str(flowers(tmp_path / "in")), **options)
    )
    source = open_source(settings)
    written = write_source(source, str(tmp_path / "shards"), limits=TINY)
    return scan(tmp_path / "in", **options), written


def test_the_reader_gives_any_image_in_any_order(tmp_path: Path) -> None:
    folder, shards = packed(tmp_path)
    expected = [Path(uri).read_bytes() for uri in folder.table["uri"].to_pylist()]
    rng = np.random.default_rng(0)
    for dataset in (folder, shards):
        reader = ImageReader(cache_groups=2)
        columns = {name: dataset.table[name].to_numpy(zero_copy_only=False) for name in ("file", "row_group", "row")}
        for _ in range(20):
            indices = rng.integers(0, 30, rng.integers(0, 12)).tolist()
            assert reader.read(dataset.table, indices) == [expected[i] for i in indices]
            assert reader.read(columns, indices) == [expected[i] for i in indices]
        assert len(reader._groups) <= 2


def test_the_reader_may_be_pickled_and_used_by_many_threads(tmp_path: Path) -> None:
    folder, shards = packed(tmp_path)
    expected = images_of(folder)
    reader = ImageReader(cache_groups=3)
    reader.read(shards.table, [0])
    again = pickle.loads(pickle.dumps(reader))
    assert not again._shards
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda i: again.read(shards.table, [i % 30, (7 * i) % 30]), range(200)))
    assert seen == [[expected[i % 30], expected[(7 * i) % 30]] for i in range(200)]


def _read_in_child(reader: ImageReader, table: pa.Table, pipe: Any) -> None:
    pipe.send(reader.read(table, range(table.num_rows)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_reader_survives_a_fork_with_its_lock_held(tmp_path: Path) -> None:
    _, shards = packed(tmp_path)
    reader = ImageReader()
    expected = reader.read(shards.table, range(30))
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(reader, shards.table, theirs))
    with reader._lock:
        child.start()
    assert ours.poll(30)
    assert ours.recv() == expected
    child.join()


def test_an_image_that_went_missing_is_named_or_raised(tmp_path: Path) -> None:
    dataset = scan(flowers(tmp_path))
    os.unlink(dataset.table["uri"][1].as_py())
    with pytest.raises(FileNotFoundError):
        ImageReader().read(dataset.table, [0, 1, 2])
    first, second, _ = ImageReader().read_each(dataset.table, [0, 1, 2])
    assert isinstance(first, bytes)
    assert isinstance(second, BadImage)
    assert "No such file" in second.reason


def test_work_in_threads_keeps_its_order_and_takes_items_late() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(10_000):
            taken += 1
            yield i

    results = ordered(lambda i: i * i, items(), threads=3)
    assert [next(results) for _ in range(50)] == [i * i for i in range(50)]
    assert taken <= 50 + 4 * 3
    results.close()  # type: ignore[attr-defined]


# Shards


def test_shards_hold_what_the_folder_holds(tmp_path: Path) -> None:
    folder, shards = packed(tmp_path)
    check_rows(shards)
    place = ["file", "row_group", "row"]
    assert shards.table.drop_columns(place).equals(folder.table.drop_columns(place))
    assert images_of(shards) == images_of(folder)
    assert shards.counts() == folder.counts()


def test_a_shard_folder_is_plain_parquet_in_small_row_groups(tmp_path: Path) -> None:
    _, shards = packed(tmp_path)
    table = ds.dataset(str(tmp_path / "shards"), format="parquet", exclude_invalid_files=True).to_table()
    assert table.schema.equals(ROW_SCHEMA)
    assert sorted(table["image_id"].to_pylist()) == list(range(30))
    files = sorted((tmp_path / "shards").glob("shard-*.parquet"))
    assert len(files) > 2
    for file in files:
        about = pq.ParquetFile(file).metadata
        assert all(about.row_group(i).num_rows <= 3 for i in range(about.num_row_groups))
    about = json.loads((tmp_path / "shards" / "dataset.json").read_text())
    assert about["classes"] == shards.classes
    assert about["counts"] == shards.counts()
    assert about["source"]["crop"] == "none"


def test_a_shard_folder_may_be_moved_and_cut_down_to_some_classes(tmp_path: Path) -> None:
    packed(tmp_path)
    (tmp_path / "shards").rename(tmp_path / "moved")
    chosen = open_shards(str(tmp_path / "moved"), FOLDER.model_copy(update={"classes": ["class 2", "class 0"]}), 0)
    check_rows(chosen)
    assert chosen.classes == ["class 0", "class 2"]
    assert chosen.table.num_rows == 20


def test_shards_without_a_validation_split_get_the_one_the_folder_gets(tmp_path: Path) -> None:
    _, uncut = packed(tmp_path, validation=0, test=0)
    assert uncut.counts() == {"train": 30, "validation": 0, "test": 0}
    opened = open_shards(str(tmp_path / "shards"), FOLDER, 3)
    assert opened.table["split"].equals(scan(tmp_path / "in", seed=3).table["split"])


def test_a_complete_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path)
    uri = str(tmp_path / "shards")
    with pytest.raises(UserError, match=r"already holds a dataset; pass --overwrite"):
        write_shards([], uri, folder.classes, folder.source)
    before = set(os.listdir(uri))
    smaller = write_source(open_source(_copy_of(uri, folder.classes[:2])), uri, overwrite=True)
    check_rows(smaller)
    assert smaller.table.num_rows == 20
    assert set(os.listdir(uri)) & before == {"dataset.json"}


def _copy_of(uri: str, classes: list[str] | None = None) -> PrepareSettings:
    data = DataSettings(source="shards", path=uri, classes=classes, validation=0, test=0)
    return PrepareSettings(output="-", data=data)


def test_a_run_that_fails_or_is_killed_harms_nothing(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path)
    uri = str(tmp_path / "shards")

    def failing() -> Iterator[dict[str, Any] | BadRow]:
        source = open_source(_copy_of(uri))
        for i, row in enumerate(source.read(source.items_of(0), 1)):
            if i == 20:
                raise RuntimeError("disk on fire")
            yield row

    before = set(os.listdir(uri))
    with pytest.raises(RuntimeError):
        write_shards(failing(), uri, folder.classes, folder.source, overwrite=True, limits=TINY)
    assert set(os.listdir(uri)) == before
    storage.write_bytes(f"{uri}/shard-deadbeef-00000.parquet", b"left by a killed run")
    assert images_of(open_shards(uri, FOLDER, 0)) == images_of(folder)
    os.rename(f"{uri}/dataset.json", f"{uri}/elsewhere")
    with pytest.raises(UserError, match="no complete dataset"):
        open_shards(uri, FOLDER, 0)


def test_errors_travel_with_the_shards_and_too_many_stop_them(tmp_path: Path) -> None:
    row = {
        "uri": "u",
        "image": jpeg(0),
        "label": 0,
        "class_name": "a",
        "split": "train",
        "width": 12,
        "height": 10,
    }
    row |= {"sha256": hashlib.sha256(row["image"]).hexdigest(), "parts": None}  # type: ignore[arg-type]
    rows: list[dict[str, Any] | BadRow] = [row, BadRow("x.jpg", "the file is empty", "a"), row]
    written = write_shards(rows, str(tmp_path / "s"), ["a"], {"kind": "test"})
    assert written.errors.to_pylist() == [{"uri": "x.jpg", "reason": "the file is empty", "class_name": "a"}]
    assert written.table["image_id"].to_pylist() == [0, 1]
    with pytest.raises(UserError, match=r"1 of 3 images can't be used.*x\.jpg \(the file is empty\)"):
        write_shards(rows, str(tmp_path / "t"), ["a"], {"kind": "test"}, max_bad=0.3)
    assert os.listdir(tmp_path / "t") == []


def test_an_image_that_changes_after_it_was_checked_stops_the_copy(tmp_path: Path) -> None:
    dataset = scan(flowers(tmp_path / "in"))
    source = open_module._of_dataset(dataset, "in", "warn")
    (tmp_path / "in" / "class 1" / "03.jpg").write_bytes(jpeg(12345))
    with pytest.raises(UserError, match=r"03\.jpg changed while it was copied"):
        write_source(source, str(tmp_path / "out"))


# Peak resident memory in a process of its own. Not tracemalloc, which doesn't see Arrow's memory; not ru_maxrss, which
# a child inherits from its parent.
_WRITE_AND_MEASURE = """
import re, sys
from protopnet.datasets.shards import write_shards

def rows(number):
    for i in range(number):
        image = i.to_bytes(4, "big") * 25_000
        yield {"uri": str(i), "image": image, "label": 0, "class_name": "a", "split": "train", "sha256": str(i)}

for number in (1000, 2500):
    write_shards(rows(number), f"{sys.argv[1]}/{number}", ["a"], {})
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_images_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITE_AND_MEASURE, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    few, many = (int(line) for line in printed.split())
    assert many - few < 60  # MB; the images of the second are 150 MB more


# Birds, settings


def test_generated_birds_are_written_once_for_the_same_settings(tmp_path: Path) -> None:
    birds = BirdSettings(classes=3, train_per_class=4, test_per_class=2, size=32)
    settings = RunSettings(birds=birds)
    first = open_dataset(settings, str(tmp_path))
    check_rows(first)
    assert first.counts() == {"train": 9, "validation": 3, "test": 6}
    assert all(first.table["parts"].to_pylist())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = open_dataset(settings, str(tmp_path))
    assert again.table.equals(first.table)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    two = open_dataset(settings.model_copy(update={"data": DataSettings(classes=2)}), str(tmp_path))
    check_rows(two)
    assert two.classes == first.classes[:2]
    check_dataset(two, 0)


def test_a_source_without_a_path_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"data\.path is missing"):
        open_source(PrepareSettings(output="-", data=DataSettings(source="cub")))


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of jobs/prepare.py."""
    monkeypatch.setattr("sys.argv", [str(PREPARE), *arguments])
    try:
        runpy.run_path(str(PREPARE), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_job_prints_what_it_wrote_and_what_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (flowers(tmp_path / "in") / "class 0" / "bad.jpg").write_bytes(b"")
    arguments = [
        "--data.source",
        "folder",
        "--data.path",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert prepare(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("30 images of 3 classes in ")
    assert printed[0].endswith(": 21 train, 3 validation, 6 test")
    assert printed[1] == f"not used: {tmp_path}/in/class 0/bad.jpg: the file is empty"
    assert printed[-1] == f"dataset: {tmp_path}/out"
    check_rows(open_shards(str(tmp_path / "out"), FOLDER, 0))
    assert prepare(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [f"error: {tmp_path}/out already holds a dataset; pass --overwrite, or choose another --output"]
    assert prepare(monkeypatch, *arguments, "--overwrite") == 0
    assert prepare(monkeypatch, *arguments, "--overwrite", "--data.max_bad", "0.01") == 2
    assert "1 of 31 images can't be used" in capsys.readouterr().err
