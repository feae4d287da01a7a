"""Files on the local disk: whole or not at all, wherever they are and whatever they are called."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from protopnet import storage
from protopnet.errors import UserError

ODD_NAMES = ["a b.json", "ümlaut-鳥.json", "quote'\".json", "star*[0]?.json", "per%20cent#1.json"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_can_be_written_read_and_listed(tmp_path: Path, name: str) -> None:
    uri = storage.join(str(tmp_path), "deep", "er", name)
    storage.write_json(uri, {"name": name})
    assert storage.read_json(uri) == {"name": name}
    assert storage.list_files(str(tmp_path), ".json") == [uri]
    assert storage.exists(uri)


def test_joining_leaves_single_slashes() -> None:
    assert storage.join("s3://bucket/", "/a/", "", "b") == "s3://bucket/a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("/") == "/"
    assert storage.join("runs", "x") == "runs/x"
    assert storage.join("s3://bucket") == "s3://bucket"


def test_only_schemes_other_than_file_are_remote(tmp_path: Path) -> None:
    assert storage.is_remote("s3://bucket/key")
    assert not storage.is_remote("runs")
    assert not storage.is_remote(f"file://{tmp_path}")
    storage.write_bytes(f"file://{tmp_path}/x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    with pytest.raises(UserError, match="isn't supported"):
        storage.filesystem("carrier-pigeon://coop/1")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    uri = str(tmp_path / "state")
    storage.write_bytes(uri, b"old")
    writer = storage.open_writer(uri)
    writer.__enter__().write(b"half of the new")
    assert storage.list_files(str(tmp_path)) == [uri]
    error = RuntimeError("failed")
    assert not writer.__exit__(RuntimeError, error, None)
    assert os.listdir(tmp_path) == ["state"]
    assert storage.read_bytes(uri) == b"old"


def test_what_a_killed_process_left_is_not_listed(tmp_path: Path) -> None:
    writer = storage.open_writer(str(tmp_path / "state"))
    handle = writer.__enter__()
    handle.write(b"half")
    handle.flush()
    assert len(os.listdir(tmp_path)) == 1
    assert storage.list_files(str(tmp_path)) == []
    writer.__exit__(None, None, None)


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "none"))
    assert not storage.exists(str(tmp_path / "none"))
    assert storage.list_files(str(tmp_path / "none")) == []
    storage.delete_file(str(tmp_path / "none"))
    storage.delete_tree(str(tmp_path / "none"))


def test_a_file_that_is_not_json_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json isn't a JSON file"):
        storage.read_json(str(tmp_path / "x.json"))


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"1")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "first").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "second").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    root = str(tmp_path / "root")
    assert storage.list_files(root) == [f"{root}/first/x", f"{root}/second/x"]


def test_deleting_a_tree_spares_the_target_of_a_link_and_refuses_everything(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    storage.delete_tree(str(tmp_path / "link"))
    assert (tmp_path / "kept" / "x").exists()
    storage.delete_tree(str(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()
    for everything in ("/", "s3://bucket", "s3://bucket/"):
        with pytest.raises(ValueError, match="refusing"):
            storage.delete_tree(everything)


def test_storage_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"can't be written: Not a directory; set storage"):
        storage.check_writable(str(tmp_path / "file" / "runs"))
    with pytest.raises(UserError, match=r"can't be written.*set output"):
        storage.check_writable("/proc/runs", "output")


def test_arrow_reads_the_same_place(tmp_path: Path) -> None:
    import pyarrow as pa

    with storage.open_writer(str(tmp_path / "t.parquet")) as handle:
        pq.write_table(pa.table({"x": [1, 2]}), handle)
    fs, path = storage.arrow_filesystem(str(tmp_path / "t.parquet"))
    assert pq.read_table(path, filesystem=fs)["x"].to_pylist() == [1, 2]
