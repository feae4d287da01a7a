"""Which images of a dataset are for training, validation and test, and which classes are taken.

The choice depends on the content of the images and the seed only: the same folder read in place, copied
elsewhere, or packed into shards is cut in the same way, and adding images moves few of the others.
"""

import difflib
import hashlib
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protopnet.config import DataSettings
from protopnet.errors import UserError


def chosen_classes(names: list[str], asked: int | list[str] | None) -> list[str]:
    """The classes that `data.classes` asks for, in their own order; `UserError` for one that isn't there."""
    if asked is None:
        return names
    if isinstance(asked, int):
        if not 1 <= asked <= len(names):
            raise UserError(f"data.classes asks for {asked} classes; there are {len(names)}")
        return names[:asked]
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"data.classes names {name!r}, which isn't a class of the dataset{hint}")
    return [name for name in names if name in set(asked)]


def keep_classes(table: pa.Table, names: list[str], chosen: list[str]) -> pa.Table:
    """The rows of the chosen classes, with labels and image_ids counted anew from 0."""
    if chosen == names:
        return table
    new_label = np.full(len(names), -1, np.int32)
    new_label[[names.index(name) for name in chosen]] = np.arange(len(chosen), dtype=np.int32)
    labels = new_label[table["label"].to_numpy()]
    table = table.filter(pa.array(labels >= 0))
    return renumbered(_replaced(table, "label", pa.array(labels[labels >= 0], pa.int32())))


def with_labels(table: pa.Table, classes: list[str]) -> pa.Table:
    """Rows with the number of their class among these names as `label`."""
    labels = pc.index_in(table["class_name"], value_set=pa.array(classes, pa.string()))
    return table.set_column(table.schema.get_field_index("label"), "label", labels)


def renumbered(table: pa.Table) -> pa.Table:
    """The same rows with image_id 0, 1, 2, …"""
    return _replaced(table, "image_id", pa.array(np.arange(table.num_rows, dtype=np.int64)))


def with_splits(table: pa.Table, settings: DataSettings, seed: int) -> pa.Table:
    """Cut a test split (share `data.test` of all) and then a validation split (share `data.validation` of the
    training images) where the source has none. Stratified by class."""
    for name, share in (("test", settings.test), ("validation", settings.validation)):
        if share > 0 and not pc.any(pc.equal(table["split"], name)).as_py():
            table = _cut(table, name, share, seed)
    return table


def _cut(table: pa.Table, name: str, share: float, seed: int) -> pa.Table:
    splits = table["split"].to_pylist()
    by_class: dict[int, list[tuple[str, int]]] = defaultdict(list)
    images = zip(table["label"].to_pylist(), table["sha256"].to_pylist(), strict=True)
    for i, (label, content) in enumerate(images):
        if splits[i] == "train":
            by_class[label].append((hashlib.sha256(f"{name}/{seed}/{content}".encode()).hexdigest(), i))
    for ranked in by_class.values():
        for _, i in sorted(ranked)[: share_of(len(ranked), share)]:
            splits[i] = name
    return _replaced(table, "split", pa.array(splits, pa.string()))


def share_of(images: int, share: float) -> int:
    """Rounded; of three images or more at least one, so that no class is missing; one stays in training."""
    wanted = int(share * images + 0.5)
    if images >= 3:
        wanted = max(1, wanted)
    return min(wanted, max(0, images - 1))


def _replaced(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), table.schema.field(column), values)
