"""Images inside tar and Parquet files, and on the web: each is found once, without being read, and read alone."""

import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving import CLASSES, photo

from protopnet import storage
from protopnet.datasets.reader import ImageReader
from protopnet.errors import UserError
from protopnet.imaging import BadImage
from protopnet.scoring.inputs import open_input

PHOTOS = [photo(n) for n in range(5)]


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read(source: Any) -> tuple[pa.Table, list[bytes | BadImage]]:
    """The rows of an input, and the images in them."""
    rows = pa.concat_tables(open_input(str(source)).tables())
    return rows, ImageReader().read_each(rows, range(len(rows)))


def test_the_members_of_a_tar_are_images_of_their_own(tmp_path: Path) -> None:
    long = f"{CLASSES[1]}/{'n' * 150}.png"  # longer than a header has room for
    files = {
        f"./{CLASSES[0]}/0.jpg": PHOTOS[0],
        f"{CLASSES[0]}/0.cls": b"3",
        "__MACOSX/0.jpg": b"no image",
        long: PHOTOS[1],
        "empty.jpg": b"",
        "küken.JPG": PHOTOS[2],
    }
    path = make_tar(tmp_path / "a.tar", files)
    rows, images = read(path)
    expected = [f"{path}/{name}" for name in (f"{CLASSES[0]}/0.jpg", long, "empty.jpg", "küken.JPG")]
    assert rows["uri"].to_pylist() == expected
    assert rows["folder"].to_pylist() == [CLASSES[0], CLASSES[1], "a.tar", "a.tar"]
    assert images == [PHOTOS[0], PHOTOS[1], b"", PHOTOS[2]]
    assert open_input(str(path)).kind == "packed"


@pytest.mark.parametrize("mode", ["w:gz", "cut"])
def test_a_tar_that_cannot_be_read_is_one_sentence(tmp_path: Path, mode: str) -> None:
    path = make_tar(tmp_path / "a.tar", {"a.jpg": PHOTOS[0], "b.jpg": PHOTOS[1]}, "w" if mode == "cut" else mode)
    if mode == "cut":
        path.write_bytes(path.read_bytes()[: 512 + len(PHOTOS[0]) // 2])
    with pytest.raises(UserError, match=r"a\.tar can't be read as a tar file.*unpacked first"):
        read(path)


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"image": PHOTOS}, ["0-0", "0-1", "1-0", "1-1", "2-0"]),
        ({"jpg": PHOTOS, "path": [f"{n}.jpg" for n in range(5)]}, [f"{n}.jpg" for n in range(5)]),
        ({"image": [{"bytes": data, "path": f"p{n}"} for n, data in enumerate(PHOTOS)]}, [f"p{n}" for n in range(5)]),
    ],
)
def test_rows_of_parquet_are_images(tmp_path: Path, columns: dict[str, list], names: list[str]) -> None:
    path = tmp_path / "a.parquet"
    labels = [CLASSES[n % 2] for n in range(5)]
    pq.write_table(pa.table({"site": range(5), "class_name": labels, **columns}), path, row_group_size=2)
    rows, images = read(path)
    assert rows["uri"].to_pylist() == [f"{path}/{name}" for name in names]
    assert rows["folder"].to_pylist() == labels
    assert images == PHOTOS


def test_columns_are_carried_of_lists_only(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PHOTOS, "site": range(5)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="of lists only"):
        open_input(str(tmp_path / "a.parquet"), ["site"])


def test_a_row_without_an_image_is_a_bad_image(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([PHOTOS[0], None], pa.binary())}), tmp_path / "a.parquet")
    _, (first, second) = read(tmp_path / "a.parquet")
    assert first == PHOTOS[0]
    assert isinstance(second, BadImage)
    assert "no image" in second.reason


def test_a_folder_may_hold_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PHOTOS[0])
    make_tar(tmp_path / "b.tar", {"x.jpg": PHOTOS[1]})
    pq.write_table(pa.table({"image": [PHOTOS[2]], "path": ["y.jpg"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "d.parquet")
    source = open_input(str(tmp_path))
    rows = pa.concat_tables(source.tables())
    assert rows["uri"].to_pylist() == [f"{tmp_path}/{name}" for name in ("a.jpg", "b.tar/x.jpg", "c.parquet/y.jpg")]
    assert ImageReader().read(rows, range(3)) == PHOTOS[:3]
    assert source.passed.others == {".parquet": 1}


def test_large_row_groups_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protopnet.datasets.reader._CACHE_BYTES", len(PHOTOS[0]))
    pq.write_table(pa.table({"image": PHOTOS}), tmp_path / "a.parquet", row_group_size=1)
    rows = pa.concat_tables(open_input(str(tmp_path)).tables())
    reader = ImageReader()
    assert reader.read(rows, range(5)) == PHOTOS
    assert len(reader._groups) == 1


class _Web(BaseHTTPRequestHandler):
    """A server of photos, of one that may not be seen, and of nothing else."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        status = 200 if name in self.server.files else 403 if name == "secret.jpg" else 404  # type: ignore[attr-defined]
        content = self.server.files.get(name, b"")  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_list_may_name_images_on_the_web_and_be_there_itself(web: ThreadingHTTPServer) -> None:
    base = f"http://127.0.0.1:{web.server_port}"
    nobody = "http://127.0.0.1:1/x.jpg"
    lines = [f"{base}/a.jpg", f"{base}/gone.jpg", f"{base}/secret.jpg", nobody, "a.jpg"]
    web.files = {"a.jpg": PHOTOS[0], "list.txt": "\n".join(lines).encode()}  # type: ignore[attr-defined]
    assert not storage.is_folder(f"{base}/list.txt")
    rows, images = read(f"{base}/list.txt")
    assert rows["uri"].to_pylist() == [*lines[:4], f"{base}/a.jpg"]
    assert [images[0], images[4]] == [PHOTOS[0], PHOTOS[0]]
    reasons = [image.reason for image in images[1:4] if isinstance(image, BadImage)]
    assert "No such file" in reasons[0]
    assert "403" in reasons[1]
    assert "can't be read" in reasons[2]


def test_a_store_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("gs://bucket/x.jpg")
    with pytest.raises(UserError, match=r"line 1: gs://bucket/x\.jpg: .*gcsfs"):
        read(tmp_path / "a.txt")
