"""Labelled data and a bundle are matched by the names of their classes."""

import pyarrow as pa
import pytest

from protopnet.datasets.rows import MANIFEST_SCHEMA, Dataset, error_table
from protopnet.errors import UserError
from protopnet.quality.evaluate import with_labels_of

BUNDLE = ["ant", "bee", "cat", "dog"]


def dataset(*classes: str) -> Dataset:
    empty = dict.fromkeys(MANIFEST_SCHEMA.names)
    rows = [empty | {"image_id": i, "label": i, "class_name": name, "split": "test"} for i, name in enumerate(classes)]
    return Dataset(list(classes), pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), {}, error_table([]))


def test_data_that_lack_classes_get_the_labels_of_the_bundle() -> None:
    assert with_labels_of(BUNDLE, dataset("dog", "bee"), "test")["label"].to_pylist() == [3, 1]


def test_classes_that_the_bundle_does_not_know_are_named() -> None:
    with pytest.raises(UserError, match=r"doesn't know: elk, fox; expected names such as ant, bee, .*--classes"):
        with_labels_of(BUNDLE, dataset("elk", "bee", "fox"), "test")
