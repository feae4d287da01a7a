"""What is known of each prototype before anybody decides: the audit's tables, and pictures of images as they are asked for.

A page at a time: 100,000 prototypes and 10,000 classes are never sent at once.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from protopnet import imaging
from protopnet.auditing.draft import Place
from protopnet.auditing.findings import KINDS, SEVERITIES
from protopnet.config import DataSettings
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError
from protopnet.pages.pictures import data_uri, heat_png
from protopnet.passes.describe import thumbnail
from protopnet.tables import read_table
from protopnet.words import readable_names

_HEAT_SIDE = 32  # pixels of a heat map; the browser enlarges it


class Catalogue:
    """Of one bundle and its data. audit: folder of its audit. grid: rows and columns of patches. data: of its training."""

    def __init__(self, audit: Path, dataset: Dataset, grid: tuple[int, int], data: DataSettings) -> None:
        self.names = readable_names(dataset.classes)
        self.classes, self.grid, self._data = dataset.classes, grid, data
        self._images = dataset.table.filter(pc.not_equal(dataset.table["split"], "test")).combine_chunks()
        self._row_of = {image_id: row for row, image_id in enumerate(self._images["image_id"].to_pylist())}
        self._reader = ImageReader()
        tables = (read_table(str(audit / f"{name}.parquet")) for name in ("prototypes", "nearest", "findings"))
        self._prototypes, self._nearest, findings = tables
        self._edges = np.searchsorted(self._nearest["prototype"].to_numpy(), np.arange(len(self._prototypes) + 1))
        self._findings: list[dict[str, Any]] = findings.to_pylist()
        self._of: dict[int, list[int]] = defaultdict(list)
        for number, found in enumerate(self._findings):
            for p in found["prototypes"]:
                self._of[p].append(number)

    def findings(self, offset: int, limit: int) -> dict[str, Any]:
        """The most serious first. One about a class as a whole leads to the prototypes of that class."""
        listed = self._findings[offset : offset + limit]
        found = [self._finding(offset + n, each) for n, each in enumerate(listed)]
        return _page(found, len(self._findings), offset)

    def prototypes(self, label: int | None, offset: int, limit: int) -> dict[str, Any]:
        """Numbers and classes, in order."""
        numbers = np.arange(len(self._prototypes))
        if label is not None:
            numbers = np.flatnonzero(self._prototypes["class"].to_numpy() == label)
        listed = numbers[offset : offset + limit].tolist()
        return _page([self.short(p) for p in listed], len(numbers), offset)

    def short(self, p: int) -> dict[str, Any]:
        self.check(p)
        label = self._prototypes["class"][p].as_py()
        return {"prototype": p, "class": label, "class_name": self.names[label]}

    def prototype(self, p: int) -> dict[str, Any]:
        """All that the audit says of one, with its nearest patches by split."""
        row = {**self.short(p), **self._prototypes.slice(p, 1).to_pylist()[0]}
        row["class_name"], row["class_key"] = self.names[row["class"]], self.classes[row["class"]]
        row["findings"] = [self._finding(number, self._findings[number]) for number in self._of[p]]
        first, last = int(self._edges[p]), int(self._edges[p + 1])
        nearest: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
        for patch in self._nearest.slice(first, last - first).to_pylist():
            heat = data_uri(heat_png(patch.pop("activation_map"), _HEAT_SIDE))
            nearest[patch["split"]].append(patch | {"class_name": self.names[patch["class"]], "heat": heat})
        return row | {"nearest": nearest}

    def image(self, image_id: int) -> dict[str, Any]:
        """What an image is."""
        row = self._row(image_id)
        return {
            **{name: row[name] for name in ("image_id", "uri", "sha256", "width", "height", "split")},
            "class": row["label"],
            "class_name": self.names[row["label"]],
        }

    def jpeg(self, image_id: int) -> bytes:
        """A small picture of it."""
        encoded = self._reader.read(self._images.slice(self._row_number(image_id), 1), [0])[0]
        try:
            return thumbnail(encoded, self._data.max_pixels, self._data.intensity)
        except imaging.BadImage as bad:
            raise UserError(f"image {image_id} can't be read any more: {bad.reason}") from None

    def patch(self, place: Place) -> dict[str, Any]:
        """The image of a patch and its cell's box on it, in pixels."""
        image_id, row, column = place
        image, (rows, columns) = self.image(image_id), self.grid
        height, width = image["height"], image["width"]
        box = [row * height // rows, column * width // columns]
        box += [-(-(row + 1) * height // rows), -(-(column + 1) * width // columns)]
        return image | {"box": box, "row": row, "column": column}

    def check(self, p: int) -> None:
        if not 0 <= p < len(self._prototypes):
            raise UserError(f"the bundle's prototypes are 0 to {len(self._prototypes) - 1}: there is no {p}")

    def _finding(self, number: int, found: Mapping[str, Any]) -> dict[str, Any]:
        prototypes = found["prototypes"]
        if not prototypes:  # about the class as a whole
            prototypes = np.flatnonzero(self._prototypes["class"].to_numpy() == found["class"]).tolist()
        return {
            "finding": number,
            "severity": SEVERITIES[found["severity"]],
            "kind": KINDS[found["kind"]],
            "class": found["class"],
            "class_name": self.names[found["class"]],
            "prototypes": prototypes,
            "text": found["text"],
            "region": found["region"],
        }

    def _row_number(self, image_id: int) -> int:
        if image_id not in self._row_of:
            raise UserError(f"there is no training or validation image {image_id}")
        return self._row_of[image_id]

    def _row(self, image_id: int) -> dict[str, Any]:
        row: dict[str, Any] = self._images.slice(self._row_number(image_id), 1).to_pylist()[0]
        return row


def _page(items: list[Any], total: int, offset: int) -> dict[str, Any]:
    end = offset + len(items)
    return {"items": items, "total": total, "offset": offset, "next": end if end < total else None}
