"""The same datasets in a bucket: a real server that speaks S3, reached as users reach theirs."""

import io
import itertools
import multiprocessing
import pickle
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from PIL import Image

from protopnet import storage
from protopnet.config import BirdSettings, DataSettings, PrepareSettings, RunSettings
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.open import open_dataset, open_source
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset, as_stored
from protopnet.datasets.shards import open_shards, write_shards, write_source
from protopnet.datasets.writer import Limits
from protopnet.errors import UserError
from protopnet.scoring.inputs import open_input

_numbers = itertools.count(1)
FOLDER = DataSettings(source="folder", path="-")
TINY = Limits(group_rows=3, group_bytes=10_000, file_bytes=4_000, index_rows=5)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a fresh bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{next(_numbers)}"
    storage.filesystem("s3://x/y")[0].mkdir(name)
    return f"s3://{name}"


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def flowers(root: Path, classes: int = 3, images: int = 10) -> Path:
    for label in range(classes):
        folder = root / f"class {label} 'ü'"
        folder.mkdir(parents=True)
        for i in range(images):
            (folder / f"{i:02d} #1*.jpg").write_bytes(jpeg(100 * label + i))
    return root


def images_of(dataset: Dataset) -> list[bytes]:
    return ImageReader().read(dataset.table, range(dataset.table.num_rows))


def without_place(dataset: Dataset) -> pa.Table:
    return dataset.table.drop_columns(["uri", "file", "row_group", "row"])


def in_bucket(tmp_path: Path, bucket: str) -> tuple[Dataset, Dataset]:
    """A local folder's dataset, and the same as shards in a bucket."""
    path = str(flowers(tmp_path / "in"))
    source = open_source(PrepareSettings(output="-", data=DataSettings(source="folder", path=path)))
    shards = write_source(source, f"{bucket}/shards", limits=TINY)
    return scan_folder(path, FOLDER, 0), shards


def test_files_behave_as_on_a_disk(bucket: str, tmp_path: Path) -> None:
    names = ["a b.json", "ümlaut-鳥.json", "quote'\".json", "star*[0]?.json", "per%20cent#1.json"]
    for name in names:
        storage.write_json(f"{bucket}/deep/{name}", {"name": name})
        assert storage.read_json(f"{bucket}/deep/{name}") == {"name": name}
    assert storage.list_files(bucket, ".json") == sorted(f"{bucket}/deep/{name}" for name in names)
    assert storage.exists(f"{bucket}/deep")
    assert storage.is_folder(f"{bucket}/deep/")
    assert not storage.exists(f"{bucket}/shallow")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{bucket}/none")
    storage.delete_tree(f"{bucket}/deep")
    storage.delete_file(f"{bucket}/deep/gone")
    assert not storage.exists(f"{bucket}/deep")
    storage.check_writable(f"{bucket}/runs")
    assert storage.list_files(f"{bucket}/runs") == []


def test_a_stream_of_files_goes_over_the_pages_of_a_bucket(bucket: str) -> None:
    names = [f"in/{'a b' if n % 2 else 'ü'}/{n}'.jpg" for n in range(1003)]  # a page has a thousand
    storage.filesystem(bucket)[0].pipe({f"{bucket}/{name}": b"x" for name in names})
    storage.write_bytes(f"{bucket}/in-between/1.jpg", b"x")
    found = list(storage.each_file(f"{bucket}/in/"))
    assert found == sorted(found, key=str.encode)
    assert found == [f"{bucket}/{name}" for name in sorted(names, key=str.encode)]
    assert len(list(storage.each_file(bucket))) == 1004
    assert list(storage.each_file(f"{bucket}/none")) == []


@pytest.mark.parametrize("size", [10, 60 << 20])  # in one piece, and in several
def test_a_failed_write_shows_nothing(bucket: str, size: int) -> None:
    writer = storage.open_writer(f"{bucket}/state")
    writer.__enter__().write(b"x" * size)
    error = RuntimeError("killed")
    assert not writer.__exit__(RuntimeError, error, None)
    assert storage.list_files(bucket) == []
    with storage.open_writer(f"{bucket}/state") as handle:
        handle.write(b"y" * size)
    assert storage.read_bytes(f"{bucket}/state") == b"y" * size


def test_what_another_process_writes_is_seen_at_once(bucket: str, endpoint: str) -> None:
    import boto3

    assert storage.list_files(bucket) == []
    assert not storage.exists(f"{bucket}/new")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key="new", Body=b"1")
    assert storage.exists(f"{bucket}/new")
    assert storage.list_files(bucket) == [f"{bucket}/new"]


def test_a_folder_in_a_bucket_is_the_folder_on_disk(bucket: str, tmp_path: Path) -> None:
    local = flowers(tmp_path / "in")
    (local / "class 1 'ü'" / "bad.jpg").write_bytes(b"")
    for path in filter(Path.is_file, local.rglob("*")):
        storage.write_bytes(f"{bucket}/flowers/{path.relative_to(local)}", path.read_bytes())
    there, here = scan_folder(f"{bucket}/flowers", FOLDER, 0), scan_folder(str(local), FOLDER, 0)
    assert without_place(there).equals(without_place(here))
    assert there.classes == here.classes
    assert there.errors["reason"].to_pylist() == ["the file is empty"]
    assert there.errors["uri"][0].as_py().startswith(f"{bucket}/flowers/class 1 'ü'/")
    reader = pickle.loads(pickle.dumps(ImageReader()))
    assert reader.read(there.table, range(29, -1, -1)) == images_of(here)[::-1]


def test_shards_in_a_bucket_hold_what_the_folder_holds(bucket: str, tmp_path: Path) -> None:
    folder, shards = in_bucket(tmp_path, bucket)
    assert without_place(shards).equals(without_place(folder))
    assert images_of(shards) == images_of(folder)
    assert all(file.startswith(f"{bucket}/shards/shard-") for file in shards.table["file"].to_pylist())
    with pytest.raises(UserError, match="already holds a dataset"):
        write_shards([], f"{bucket}/shards", ["a"], {})
    again = PrepareSettings(output="-", data=DataSettings(source="shards", path=f"{bucket}/shards"))
    source = open_source(again)
    copy = write_source(source, str(tmp_path / "copy"))
    assert images_of(copy) == images_of(folder)


def test_one_image_costs_its_row_group_and_that_only_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "uri": "u",
        "label": 0,
        "class_name": "a",
        "split": "train",
        "width": 1,
        "height": 1,
        "parts": None,
    }
    rows = [row | {"image": bytes([i]) * 100_000, "sha256": str(i)} for i in range(40)]
    table = as_stored(write_shards(rows, f"{bucket}/one", ["a"], {}, limits=Limits(group_rows=4)).table)
    images = [rows[image_id]["image"] for image_id in table["image_id"].to_pylist()]
    fetched: list[int] = []
    fetch = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return fetch(self, start, end)  # type: ignore[no-any-return]

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    reader = ImageReader(cache_groups=2)
    assert reader.read(table, [21]) == [images[21]]
    assert 400_000 < sum(fetched) < 600_000  # four images and the footer, of 4 MB
    fetched.clear()
    assert reader.read(table, [20, 23]) == [images[20], images[23]]
    assert fetched == []
    reader.read(table, [0, 39])
    assert 800_000 < sum(fetched) < 810_000  # two more groups, the footer not again


def test_birds_can_be_written_to_a_bucket(bucket: str) -> None:
    birds = BirdSettings(classes=2, train_per_class=3, test_per_class=1, size=32)
    dataset = open_dataset(RunSettings(birds=birds), f"{bucket}/work")
    assert dataset.counts() == {"train": 4, "validation": 2, "test": 2}
    assert len(images_of(dataset)) == 8


def _child(reader: ImageReader, table: pa.Table, pipe: Any) -> None:
    pipe.send(reader.read(table, range(table.num_rows)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_reader_works_on_both_sides_of_a_fork(bucket: str, tmp_path: Path) -> None:
    _, shards = in_bucket(tmp_path, bucket)
    reader = ImageReader()
    expected = reader.read(shards.table, range(30))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(reader, shards.table, theirs))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == expected
    child.join(10)
    assert reader.read(shards.table, range(29, -1, -1)) == expected[::-1]


# What only the user can put right


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value).strip()
    return str(error.value)


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    for action in (
        lambda: storage.read_bytes("s3://no-such-bucket/x"),
        lambda: storage.list_files("s3://no-such-bucket/x"),
        lambda: storage.check_writable("s3://no-such-bucket/x"),
        lambda: open_shards("s3://no-such-bucket/x", FOLDER, 0),
        lambda: scan_folder("s3://no-such-bucket/x", FOLDER, 0),
        lambda: write_shards([], "s3://no-such-bucket/x", [], {}),
    ):
        with pytest.raises(UserError) as error:
            action()
        assert "no-such-bucket" in one_line(error)


def test_nobody_at_the_endpoint_is_said_plainly(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError) as error:
        storage.check_writable(f"{bucket}/x")
    assert "AWS_ENDPOINT_URL" in one_line(error)


def test_missing_credentials_are_said_plainly(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError) as error:
        storage.read_bytes(f"{bucket}/x")
    assert "credentials" in one_line(error)


class Refusing(BaseHTTPRequestHandler):
    """What S3 answers to a key it doesn't know."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist.</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_wrong_credentials_are_said_plainly(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        for action in (storage.check_writable, storage.read_bytes, storage.list_files, storage.exists):
            with pytest.raises(UserError) as error:
                action(f"{bucket}/x")
            assert "check the AWS credentials" in one_line(error)
    finally:
        server.shutdown()
        server.server_close()


def test_packed_images_of_a_bucket_are_read_by_ranges(bucket: str) -> None:
    images = [jpeg(n) for n in range(3)]
    tar, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in zip(("a.jpg", "b.txt", "sub/c.jpg"), images, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"image": images}), table, row_group_size=2)
    storage.write_bytes(f"{bucket}/in/x.tar", tar.getvalue())
    storage.write_bytes(f"{bucket}/in/y.parquet", table.getvalue())
    rows = pa.concat_tables(open_input(f"{bucket}/in").tables())
    names = ["x.tar/a.jpg", "x.tar/sub/c.jpg", "y.parquet/0-0", "y.parquet/0-1", "y.parquet/1-0"]
    assert rows["uri"].to_pylist() == [f"{bucket}/in/{name}" for name in names]
    assert ImageReader().read(rows, range(5)) == [images[0], images[2], *images]
