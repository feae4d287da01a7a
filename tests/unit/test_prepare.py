"""Shards are the same however often the job was killed, and whatever the images came in; each image is read once."""

import io
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protopnet import storage
from protopnet.commands.prepare import prepare
from protopnet.config import DataSettings, PrepareSettings
from protopnet.datasets.open import open_source
from protopnet.datasets.rows import Dataset
from protopnet.datasets.shards import write_source
from protopnet.datasets.writer import Limits
from protopnet.errors import UserError

TINY = Limits(group_rows=3, file_bytes=4_000, index_rows=5)
CLASSES, EACH = 3, 12


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """By path; one of them is broken."""
    found = {f"class {k}/{i:02d}.jpg": jpeg(100 * k + i) for k in range(CLASSES) for i in range(EACH)}
    return found | {"class 1/05.jpg": b"no image"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, data in images().items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(data)
    return tmp_path / "in"


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def settings_of(path: Path) -> PrepareSettings:
    return PrepareSettings(data=DataSettings(source="folder", path=str(path), max_bad=0.1))


def write(path: Path, output: Path, **more: Any) -> Dataset:
    source = replace(open_source(settings_of(path)), chunk=more.pop("chunk", 5))
    return write_source(source, str(output), limits=TINY, max_bad=0.1, **more)


def content(output: Path) -> list[pa.Table]:
    """What is in the shards, file by file and row group by row group, and in the tables beside them."""
    files = [*sorted(output.glob("shard-*")), *output.glob("_index-*"), *output.glob("_errors-*")]
    opened = [pq.ParquetFile(file) for file in files]
    return [file.read_row_group(i) for file in opened for i in range(file.num_row_groups)]


_KILLED = """
import os, signal, sys
from pathlib import Path
from test_prepare import write
from protopnet import storage
from protopnet.datasets import shards

count = int(sys.argv[4])

def dies(function):
    def counted(*given):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(sys.argv[2] + ".log", "a") as log:
            print(given[0], file=log)
        return function(*given)
    return counted

if sys.argv[3] == "image":
    storage.read_bytes = dies(storage.read_bytes)
else:
    shards.write_shard = dies(shards.write_shard)
write(Path(sys.argv[1]), Path(sys.argv[2]), cores=1)
"""


@pytest.mark.parametrize(("what", "after"), [("image", 23), ("shard", 2)])
def test_a_killed_job_goes_on_to_the_same_shards_byte_for_byte(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, after: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(folder, whole)
    command = [sys.executable, "-c", _KILLED, str(folder), str(killed), what, str(after)]
    code = subprocess.run(command, env=_environment()).returncode
    assert code == -signal.SIGKILL
    assert not (killed / "dataset.json").exists()
    read: Counter[str] = Counter()
    monkeypatch.setattr(storage, "read_bytes", _counting(storage.read_bytes, read))
    write(folder, killed)
    again = sum(number for uri, number in read.items() if uri.startswith(str(folder)) and uri.endswith(".jpg"))
    assert again == (36 - 20 if what == "image" else 0)  # four chunks of five were finished
    assert content(killed) == content(whole)
    ours, theirs = (sorted(place.glob("shard-*")) for place in (killed, whole))
    assert len(ours) > 3
    assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]
    assert not [path for path in killed.iterdir() if path.name.startswith((".", "_pieces"))]


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}


def _counting(function: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def counted(uri: str) -> Any:
        seen[uri] += 1
        return function(uri)

    return counted


def backwards(work: Callable[[Any], Any], items: Any) -> list[Any]:
    return [work(item) for item in reversed(list(items))]


def test_each_image_is_read_once_and_the_order_of_the_work_does_not_matter(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    monkeypatch.setattr(storage, "read_bytes", _counting(storage.read_bytes, read))
    first = write(folder, tmp_path / "a")
    assert {uri: number for uri, number in read.items() if uri.startswith(str(folder))} == {
        f"{folder}/{path}": 1 for path in images()
    }
    write(folder, tmp_path / "b", spread=backwards, chunk=7)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert first.errors["uri"].to_pylist() == [f"{folder}/class 1/05.jpg"]


def test_pieces_of_other_images_or_settings_are_not_gone_on_with(tmp_path: Path, folder: Path) -> None:
    def stop(count: int, total: int | None) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError):
        write(folder, tmp_path / "out", checked=stop)
    (folder / "class 0/new.jpg").write_bytes(jpeg(99))
    assert len(write(folder, tmp_path / "out").table) == 36
    assert not list((tmp_path / "out").glob("_pieces*"))


def test_too_many_bad_images_leave_nothing_that_counts_the_next_time(tmp_path: Path, folder: Path) -> None:
    strict = replace(open_source(settings_of(folder)), chunk=5)
    with pytest.raises(UserError, match=r"1 of 36 images"):
        write_source(strict, str(tmp_path / "out"), max_bad=0.0)
    (folder / "class 1/05.jpg").write_bytes(jpeg(105))
    assert len(write_source(strict, str(tmp_path / "out"), max_bad=0.0).table) == 36


def of_class_folders(place: Path) -> None:
    members = list(images().items())
    tar(place / "b.tar", dict(members[::2]))
    tar(place / "a.tar", {f"./{name}": data for name, data in members[1::2]} | {"notes.txt": b"x"})


def of_web_dataset(place: Path) -> None:
    """Samples in a drawn order, as WebDataset wants them, with the class beside each."""
    numbers = np.random.default_rng(0).permutation(CLASSES * EACH)
    members = sorted(images().items())
    for shard in range(3):
        files: dict[str, bytes] = {}
        for n in numbers[shard::3]:
            name, data = members[n]
            files |= {f"{n:05d}.jpg": data, f"{n:05d}.cls": name.split("/")[0].encode()}
        tar(place / f"images-{shard:03d}.tar", files)


@pytest.mark.parametrize("lay", [of_class_folders, of_web_dataset])
def test_tar_files_give_what_the_folder_gives(
    tmp_path: Path, folder: Path, lay: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path / "tars")
    expected = write(folder, tmp_path / "a")
    opened: Counter[str] = Counter()
    reader = storage.open_reader
    monkeypatch.setattr(storage, "open_reader", lambda uri, ahead=0: opened.update([uri]) or reader(uri, ahead))
    packed = write(tmp_path / "tars", tmp_path / "b")
    assert {uri: n for uri, n in opened.items() if uri.endswith(".tar")} == {
        str(path): 1 for path in (tmp_path / "tars").iterdir()
    }
    assert packed.classes == expected.classes
    assert packed.counts() == expected.counts()
    other = ["uri", "file", "row_group", "row"]
    assert packed.table.drop_columns(other).equals(expected.table.drop_columns(other))
    assert [e["reason"] for e in packed.errors.to_pylist()] == [e["reason"] for e in expected.errors.to_pylist()]
    assert packed.errors["class_name"].to_pylist() == ["class 1"]
    for ours, theirs in zip(
        sorted((tmp_path / "b").glob("shard-*")), sorted((tmp_path / "a").glob("shard-*")), strict=True
    ):
        assert pq.read_table(ours, columns=["image"]).equals(pq.read_table(theirs, columns=["image"]))


def test_splits_of_tar_files_are_in_their_names_and_numbers_are_classes_by_value(tmp_path: Path) -> None:
    sample = {f"{n}.{kind}": data for n in range(11) for kind, data in (("jpg", jpeg(n)), ("cls", str(n).encode()))}
    tar(tmp_path / "set-train-000.tar", sample)
    tar(tmp_path / "val" / "000.tar", {f"x{name}": data for name, data in sample.items()})
    tar(tmp_path / "test_0.tar", {f"y{name}": data for name, data in sample.items()})
    tar(tmp_path / "test_1.tar", {"none.jpg": jpeg(1)})
    dataset = prepare({"data.source": "folder", "data.path": str(tmp_path), "output": str(tmp_path / "out")})
    assert dataset.classes == [str(n) for n in range(11)]
    assert dataset.counts() == {"train": 11, "validation": 11, "test": 11}
    assert dataset.source["passed_over"] == "1 image outside the class folders not used"
    assert not (tmp_path / "out/lease.json").exists()


def test_a_tar_beside_its_images_is_passed_over(tmp_path: Path, folder: Path) -> None:
    tar(folder / "all.tar", images())
    assert len(write(folder, tmp_path / "out").table) == 35
