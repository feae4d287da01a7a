"""Class folders and WebDataset in tar files, for `jobs/prepare.py`: each tar is read once, from its beginning to its end.

data/a.tar, b.tar            what is inside counts as if it were unpacked in data/: rose/1.jpg, train/rose/1.jpg, …
data/train-000.tar           with `17.jpg` and `17.cls` (a number or a name of a class) beside each other; the split is
data/val/000.tar             that of a word in the tar's name, or of its folder
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets.duplicates import settled
from protopnet.datasets.files import Passed
from protopnet.datasets.folders import checked_row, labelled_dataset
from protopnet.datasets.layout import layout_of, split_of
from protopnet.datasets.packed import READ_BYTES, is_image, opened_tar
from protopnet.datasets.pieces import Source
from protopnet.datasets.pool import ordered
from protopnet.datasets.rows import BadRow, Dataset
from protopnet.datasets.splits import chosen_classes
from protopnet.errors import UserError


def tar_files(path: str) -> list[str]:
    """The tar files at a location, where no image lies beside them: a tar beside what was unpacked of it is passed over."""
    root = storage.located(path)
    if root.lower().endswith(".tar") and storage.exists(root):
        return [root]
    tars = []
    for path in Passed().images_among((uri[len(root) :].lstrip("/") for uri in storage.each_file(root)), {".tar"}):
        if not path.lower().endswith(".tar"):
            return []
        tars.append(storage.join(root, path))
    return sorted(tars)


def tar_source(tars: list[str], root: str, key: str, data: DataSettings, seed: int) -> Source:
    """The images in tar files; a file is the unit of work."""
    finish = partial(_finish, root, data, seed)
    return Source(tars, partial(_read, max_pixels=data.max_pixels), finish, key, root, chunk=1)


@dataclass(frozen=True)
class _Member:
    uri: str
    image: bytes
    class_name: str | None


def _read(tars: list[str], cores: int, *, max_pixels: int) -> Iterator[dict[str, Any] | BadRow]:
    def row(member: _Member) -> dict[str, Any] | BadRow:
        return checked_row(member.image, member.uri, member.class_name, None, max_pixels)

    for tar in tars:
        yield from ordered(row, _members(tar), cores)


def _members(tar: str) -> Iterator[_Member]:
    """The images, each with the class that a `.cls` beside it names."""
    waiting: dict[str, dict[str, bytes]] = {}  # of the sample that is being read: images by name
    key, class_name = "", None
    with storage.open_reader(tar, READ_BYTES) as handle, opened_tar(handle, tar) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # or all that were seen would be held
            name = member.name.removeprefix("./")
            folder, file = os.path.split(name)
            sample = os.path.join(folder, file.split(".")[0])
            if sample != key:
                yield from _of_sample(tar, waiting.pop(key, {}), class_name)
                key, class_name = sample, None
            if member.isreg() and member.sparse is None and (is_image(name) or name.endswith(".cls")):
                content = archive.extractfile(member)
                data = content.read() if content else b""
                if name.endswith(".cls"):
                    class_name = data.decode("utf-8", "replace").strip()
                else:
                    waiting.setdefault(key, {})[name] = data
        yield from _of_sample(tar, waiting.pop(key, {}), class_name)


def _of_sample(tar: str, images: dict[str, bytes], class_name: str | None) -> Iterator[_Member]:
    return (_Member(storage.join(tar, name), image, class_name) for name, image in images.items())


def _finish(root: str, data: DataSettings, seed: int, rows: pa.Table, errors: pa.Table) -> Dataset:
    """Classes and splits from the names of all images, and from what lay beside them; in the order (class, path)."""
    named = _Named.of(root, rows, errors)
    names = sorted(named.classes, key=_in_order(named.classes))
    if not names:
        raise UserError(
            f"{root} holds no images of a class (data.path); expected class folders in the tar files, or .cls"
        )
    classes = chosen_classes(names, data.classes)
    rows, outside = named.applied(rows, classes)
    errors, _ = named.applied(errors, [*classes, ""])
    source = {"kind": "tar", "path": root, "crop": "none"}
    if outside:
        source["passed_over"] = Passed(outside=outside).text() or ""
    dataset = labelled_dataset(classes, rows, source, errors, data, seed)
    return settled(dataset, data.duplicates)[0]


@dataclass(frozen=True)
class _Named:
    """Path, class (None: of none) and split of each image, by its uri."""

    images: dict[str, tuple[str, str | None, str]]

    @classmethod
    def of(cls, root: str, rows: pa.Table, errors: pa.Table) -> "_Named":
        beside = dict(zip(rows["uri"].to_pylist(), rows["class_name"].to_pylist(), strict=True))
        beside |= dict(zip(errors["uri"].to_pylist(), errors["class_name"].to_pylist(), strict=True))
        paths = {uri: _unpacked(uri, root) for uri in beside}
        bare = [path for uri, path in paths.items() if beside[uri] is None]
        layout = layout_of(bare, {path.split("/")[0] for path in bare if "/" in path})
        images: dict[str, tuple[str, str | None, str]] = {}
        for uri, path in paths.items():
            place = layout.place(path) if beside[uri] is None else (beside[uri], _split_of_tar(uri, root))
            images[uri] = (path, *(place or (None, "train")))
        return cls(images)

    @property
    def classes(self) -> set[str]:
        return {name for _, name, _ in self.images.values() if name is not None}

    def applied(self, table: pa.Table, kept: list[str]) -> tuple[pa.Table, int]:
        """Rows of these classes in the order (class, path), and how many have none."""
        places = [self.images[uri] for uri in table["uri"].to_pylist()]
        known = set(kept)
        chosen = [i for i, (_, name, _) in enumerate(places) if (name or "") in known]
        rank = {name: n for n, name in enumerate(kept)}
        chosen.sort(key=lambda i: (rank[places[i][1] or ""], places[i][0]))
        table = table.take(pa.array(chosen, pa.int64()))
        for at, column in ((1, "class_name"), (2, "split")):
            if column in table.column_names:
                values = pa.array([places[i][at] for i in chosen], pa.string())
                table = table.set_column(table.column_names.index(column), column, values)
        return table, sum(name is None for _, name, _ in places)


def _unpacked(uri: str, root: str) -> str:
    """The path of a member as if it were unpacked where its tar is: `train/rose/1.jpg` of `train/000.tar/rose/1.jpg`."""
    path = _tar_of(uri, root)
    inside = uri[len(path) :].lstrip("/")
    return f"{above}/{inside}" if (above := os.path.dirname(path[len(root) :].lstrip("/"))) else inside


def _tar_of(uri: str, root: str) -> str:
    end = len(root) if root.lower().endswith(".tar") else uri.lower().index(".tar/", len(root)) + len(".tar")
    return uri[:end]


def _split_of_tar(uri: str, root: str) -> str:
    pieces = _tar_of(uri, root)[len(root) :].removesuffix(".tar").split("/")
    words = [word for piece in pieces for word in (piece, *re.split(r"[^A-Za-z]+", piece)) if word]
    return next((split for word in words if (split := split_of(word))), "train")


def _in_order(names: set[str]) -> Any:
    """Numbers by value, so that class 10 comes after 9; names by the alphabet."""
    return (lambda name: (int(name), name)) if all(name.isdecimal() for name in names) else None
