"""Whatever names the images to score, each is a row of the manifest, in an order that doesn't change."""

import os
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import CLASSES, photo

from protopnet import storage
from protopnet.datasets.shards import write_shards
from protopnet.errors import UserError
from protopnet.scoring.inputs import INPUT_SCHEMA, Input, open_input
from protopnet.scoring.manifest import contents_of, read_chunk, write_manifest
from protopnet.scoring.record import JobRecord, begin, default_chunk_rows, resume

NAMES = ["a b.jpg", "A.JPeG", 'it\'s "quoted".png', "küken-鳥.WEBP", "new\nline.gif", "per%20cent#1.bmp", "x;,.tif"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Empty files: what is in them is not the listing's business."""
    for name in NAMES:
        (tmp_path / "in" / CLASSES[0]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / CLASSES[0] / name).touch()
    for other in ("notes.txt", ".hidden.jpg", "Thumbs.db", ".cache/x.jpg", "elsewhere/deep/y.JPG"):
        path = tmp_path / "in" / other
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    return tmp_path / "in"


def uris(source: Input) -> list[str]:
    return pa.concat_tables([INPUT_SCHEMA.empty_table(), *source.tables()])["uri"].to_pylist()


def test_a_folder_gives_every_image_once(folder: Path) -> None:
    (folder / "elsewhere" / "back").symlink_to(folder)
    source = open_input(f"{folder}/")
    assert source.kind == "folder"
    assert uris(source) == [*(f"{folder}/{CLASSES[0]}/{n}" for n in sorted(NAMES)), f"{folder}/elsewhere/deep/y.JPG"]
    assert uris(source) == uris(open_input(str(folder)))


def test_a_stream_of_files_is_the_list_of_files(folder: Path) -> None:
    assert sorted(storage.each_file(str(folder))) == storage.list_files(str(folder))
    assert list(storage.each_file(str(folder / "nowhere"))) == []


def test_a_name_that_is_no_text_keeps_its_row(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/b\xff.jpg", "wb") as handle:
        handle.write(photo())
    assert uris(open_input(str(tmp_path))) == [f"{tmp_path}/b\ufffd.jpg"]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".parquet"])
def test_lists_of_every_kind(tmp_path: Path, suffix: str) -> None:
    listed = ["a b.jpg", "sub/küken.jpg", "/absolute/x.jpg", "s3://bucket/key 1.jpg", "a b.jpg", "it's.jpg"]
    path = tmp_path / f"list{suffix}"
    separator = "\t" if suffix == ".tsv" else ","
    if suffix == ".parquet":
        pq.write_table(pa.table({"site": range(len(listed)), "URI": listed}), path)
    elif suffix == ".txt":
        path.write_text("\ufeff" + "\r\n".join(listed) + "\n\n", encoding="utf-8")
    else:
        rows = [f'{n}{separator}"{entry}"' for n, entry in enumerate(listed)]
        path.write_text("\n".join([f"site{separator}uri", *rows]), encoding="utf-8")
    expected = [entry if entry.startswith(("/", "s3:")) else f"{tmp_path}/{entry}" for entry in listed]
    source = open_input(str(path))
    assert (source.kind, uris(source)) == ("list", expected)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"place,size\nx.jpg,3", "no column uri.*its columns are place, size"),
        ("a.txt", b"x.jpg\npigeon://coop/y.jpg", "line 2: pigeon://coop/y.jpg: .*supported"),
        ("a.csv", b'uri\nx.jpg\n""\n', "line 3: expected the location of an image"),
        ("a.txt", b"\xff\xfe\x00", "isn't text in UTF-8"),
        ("a.parquet", b"no parquet", "can't be read as Parquet"),
    ],
)
def test_a_list_that_is_wrong_is_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        uris(open_input(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "nowhere.jpg"])
def test_nothing_there_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="nowhere.*--input"):
        open_input(str(tmp_path / name))


def test_shards_give_their_rows(tmp_path: Path) -> None:
    row = {"label": 0, "split": "train", "width": 9, "height": 6, "parts": None}
    named = [row | {"uri": f"u{n}", "class_name": CLASSES[n % 2], "image": photo(n), "sha256": ""} for n in range(5)]
    dataset = write_shards(named, str(tmp_path / "shards"), CLASSES[:2], {})
    table = pa.concat_tables(open_input(str(tmp_path / "shards")).tables())
    own = table.sort_by("image_id")
    assert own.drop_columns(["folder"]).equals(dataset.table.select(["image_id", "uri", "file", "row_group", "row"]))
    assert own["folder"].to_pylist() == [CLASSES[n % 2] for n in range(5)]
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4]  # read as they lie


@given(pieces=st.lists(st.integers(0, 9), max_size=8), rows=st.integers(1, 12))
def test_a_manifest_holds_every_image_once_in_chunks(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int], rows: int
) -> None:
    folder, count = str(tmp_path_factory.mktemp("job")), sum(pieces)

    def tables() -> list[pa.Table]:
        numbers, made = iter(range(count)), []
        for size in pieces:
            names = [f"x{next(numbers)}" for _ in range(size)]
            columns = [[None] * size, names, names, [-1] * size, [-1] * size, [CLASSES[2]] * size]
            made.append(pa.table(columns, schema=INPUT_SCHEMA))
        return made

    contents, chunk_rows = write_manifest(iter(tables()), folder, CLASSES, lambda images: rows)
    assert (contents.images, chunk_rows) == (count, rows)
    assert contents == contents_of(iter(tables()))
    chunks = [read_chunk(folder, chunk, rows) for chunk in range(-(-count // rows))]
    assert [len(chunk) for chunk in chunks[:-1]] == [rows] * len(chunks[:-1])
    found = [row for chunk in chunks for row in chunk.to_pylist()]
    assert [(row["image_id"], row["uri"], row["label"]) for row in found] == [(n, f"x{n}", 2) for n in range(count)]


def test_a_long_manifest_is_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protopnet.scoring.manifest._FILE_ROWS", 6)
    monkeypatch.setattr("protopnet.scoring.manifest._LOOK_AHEAD", 2)
    piece = pa.table([[None] * 5, ["u"] * 5, ["u"] * 5, [-1] * 5, [-1] * 5, [None] * 5], schema=INPUT_SCHEMA)
    write_manifest(iter([piece] * 4), str(tmp_path), CLASSES, lambda images: 3)
    assert len(list(tmp_path.glob("manifest-*.parquet"))) == 4
    ids = [i for chunk in range(7) for i in read_chunk(str(tmp_path), chunk, 3)["image_id"].to_pylist()]
    assert ids == list(range(20))


@given(images=st.integers(0, 10**9), actors=st.integers(1, 500), batch=st.integers(1, 300))
def test_chunks_are_whole_batches_and_neither_small_nor_large(images: int, actors: int, batch: int) -> None:
    rows = default_chunk_rows(images, actors, batch)
    assert rows % batch == 0
    assert 256 <= rows < 4096 + batch


class TestRecord:
    """A folder of scores goes on only with what it was begun with."""

    SETTINGS: ClassVar[dict[str, object]] = {"explain": 0, "chunk_rows": 3, "batch_size": None, "abstain": None}

    def begun(self, folder: Path, output: Path, **changes: object) -> Path:
        asked = {"bundles": ["aa"], "settings": self.SETTINGS, "classes": CLASSES, "batch_size": 8, "actors": 1}
        begin(str(output), open_input(str(folder)), **(asked | changes))
        return output

    def again(self, folder: Path, output: Path, bundles: tuple[str, ...] = ("aa",), **changes: object) -> str | None:
        found = resume(str(output), open_input(str(folder)), bundles=[*bundles], settings=self.SETTINGS | changes)
        assert found is not None
        assert found[0].images == len(NAMES) + 1
        return found[1]

    def test_the_same_goes_on(self, folder: Path, tmp_path: Path) -> None:
        assert resume(str(tmp_path / "o"), open_input(str(folder)), bundles=["aa"], settings=self.SETTINGS) is None
        output = self.begun(folder, tmp_path / "o")
        assert self.again(folder, output) is None
        assert self.again(folder, output, batch_size=8) is None  # what was chosen then, said aloud

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"explain": 3}, "--explain 0, not 3"),
            ({"abstain": 0.5}, "--abstain null, not 0.5"),
            ({"batch_size": 9}, "--batch_size null, not 9"),
            ({"chunk_rows": 4}, "--chunk_rows 3, not 4"),
            ({"bundles": ("aa", "bb")}, r"other bundles \(--bundle\), sha256 aa, not aa, bb"),
        ],
    )
    def test_something_else_is_refused(self, folder: Path, tmp_path: Path, changes: dict, sentence: str) -> None:
        output = self.begun(folder, tmp_path / "o")
        with pytest.raises(UserError, match=f"{sentence}; give what it was begun with.*another --output"):
            self.again(folder, output, **changes)

    def test_another_folder_is_refused_and_a_changed_one_is_said(self, folder: Path, tmp_path: Path) -> None:
        output = self.begun(folder, tmp_path / "o")
        with pytest.raises(UserError, match="was begun with --input"):
            self.again(folder / "elsewhere", output)
        (folder / "new.jpg").touch()
        note = self.again(folder, output)
        assert note is not None
        assert f"{len(NAMES) + 2} images now, {len(NAMES) + 1} when this job began" in note

    def test_a_changed_list_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("a.jpg\nb.jpg")
        output = self.begun(tmp_path / "list.txt", tmp_path / "o")
        (tmp_path / "list.txt").write_text("a.jpg\nc.jpg")
        with pytest.raises(UserError, match="list.txt has changed.*another --output"):
            self.again(tmp_path / "list.txt", output)

    def test_no_images_are_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        with pytest.raises(UserError, match="holds no images"):
            self.begun(tmp_path / "in", tmp_path / "o")
        assert not (tmp_path / "o/job/job.json").exists()

    def test_a_folder_of_somebody_else_is_left_alone(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "o/parts").mkdir(parents=True)
        with pytest.raises(UserError, match=r"without their job/job.json"):
            self.again(folder, tmp_path / "o")


class TestGrowing:
    """--incremental: what is new is a batch of its own, and what was there stays as it is."""

    SETTINGS: ClassVar[dict[str, object]] = {"chunk_rows": 3, "batch_size": None}

    def step(self, source: Path, output: Path, growing: bool = True) -> tuple[JobRecord, str | None]:
        asked = {"bundles": ["aa"], "settings": self.SETTINGS}
        opened = open_input(str(source))
        found = resume(str(output), opened, **asked, growing=CLASSES if growing else None)  # type: ignore[arg-type]
        if found is not None:
            return found
        return begin(str(output), opened, **asked, classes=CLASSES, batch_size=8, actors=1), None  # type: ignore[arg-type]

    def names(self, record: JobRecord, output: Path) -> list[list[tuple[int, str]]]:
        """image_id and name of each image, by chunk."""
        rows = [record.rows(str(output / "job"), chunk) for chunk in range(record.chunks)]
        assert [len(table) for table in rows] == [record.rows_in(chunk) for chunk in range(record.chunks)]
        return [[(row["image_id"], row["uri"].rsplit("/", 1)[-1]) for row in table.to_pylist()] for table in rows]

    def test_new_images_are_chunks_behind_those_there_were(self, tmp_path: Path) -> None:
        source, output = tmp_path / "in", tmp_path / "o"
        (source / CLASSES[1]).mkdir(parents=True)
        for name in "bdfh":
            (source / CLASSES[1] / f"{name}.jpg").touch()
        first, note = self.step(source, output)
        before = self.names(first, output)
        assert (note, [len(chunk) for chunk in before]) == (None, [3, 1])
        for name in "ac":
            (source / CLASSES[1] / f"{name}.jpg").touch()
        grown, note = self.step(source, output)
        assert note == "2 new images"
        assert self.names(grown, output) == [*before, [(4, "a.jpg"), (5, "c.jpg")]]
        again, note = self.step(source, output)
        assert (again, note) == (grown, "no new images")
        (source / CLASSES[1] / "b.jpg").unlink()
        (source / CLASSES[1] / "z.jpg").touch()
        last, _ = self.step(source, output)
        assert self.names(last, output) == [*self.names(grown, output), [(6, "z.jpg")]]
        assert self.step(source, output, growing=False) == (last, None)  # goes on with what it has

    def test_a_list_may_grow_and_have_an_image_twice(self, tmp_path: Path) -> None:
        source, output = tmp_path / "list.txt", tmp_path / "o"
        source.write_text("a.jpg\nb.jpg\na.jpg\n")
        first, _ = self.step(source, output)
        source.write_text("a.jpg\nb.jpg\na.jpg\nc.jpg\nc.jpg\nb.jpg\n")
        grown, _ = self.step(source, output)
        assert self.names(grown, output) == [*self.names(first, output), [(3, "c.jpg"), (4, "c.jpg")]]
        assert self.step(source, output, growing=False) == (grown, None)

    def test_a_manifest_that_was_not_finished_is_written_anew(self, tmp_path: Path) -> None:
        source, output = tmp_path / "list.txt", tmp_path / "o"
        source.write_text("a.jpg\n")
        self.step(source, output)
        (output / "job/batch-00001").mkdir()
        (output / "job/batch-00001/manifest-00000.parquet").write_bytes(b"half")
        source.write_text("a.jpg\nb.jpg\n")
        grown, _ = self.step(source, output)
        assert self.names(grown, output) == [[(0, "a.jpg")], [(1, "b.jpg")]]

    def test_shards_do_not_grow(self, tmp_path: Path) -> None:
        row = {"label": 0, "split": "train", "width": 9, "height": 6, "parts": None, "class_name": CLASSES[0]}
        write_shards([row | {"uri": "u", "image": photo(0), "sha256": ""}], str(tmp_path / "s"), CLASSES[:1], {})
        self.step(tmp_path / "s", tmp_path / "o")
        with pytest.raises(UserError, match="--incremental"):
            self.step(tmp_path / "s", tmp_path / "o")
