"""Patches that no prototype may stand for: `IMAGE:BOX` as people write it, and the patches that lie on such a box.

A patch *lies on* a box when the part of the image that its latent cells cover, as if the latent map lay over the
image, has any area in common with the box. (What the patch can see, its receptive field, is larger.) Boxes are (top,
left, bottom, right), half-open, in pixels of the original image after its EXIF turn.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protopnet.auditing.draft import Place
from protopnet.auditing.patch_table import on_object
from protopnet.errors import UserError

Box = tuple[int, int, int, int]
Region = tuple[float, float, float, float] | Literal["background"]
_FORM = "IMAGE:top,left,bottom,right in pixels of the image, or IMAGE:all"
_SHOWN = 3  # names that an error lists
_EDGE = 1e-6  # a region in shares that ends where a cell begins doesn't touch it
_SAMPLES = 4  # points of a cell along each side that tell whether it is on the object


@dataclass(frozen=True)
class Barred:
    """A box on a training image. The image is known by its sha256: its copies are barred with it."""

    uri: str
    sha256: str
    box: Box

    def record(self) -> dict[str, Any]:
        return {"uri": self.uri, "sha256": self.sha256, "box": list(self.box)}


@dataclass(frozen=True)
class BarredRegion:
    """A place on every training image, or on those of a class, or on one: a box in shares of height and width, or the
    background, which is all beside the object's mask or outside the outline of its key points (where there is either)."""

    region: Region
    class_name: str | None = None
    sha256: str | None = None

    def record(self) -> dict[str, Any]:
        region = self.region if self.region == "background" else list(self.region)
        return {"region": region, "class": self.class_name, "sha256": self.sha256}

    def of(self, rows: pa.Table) -> pa.Table:
        """Those of these manifest rows that it is on."""
        if self.class_name is not None:
            rows = rows.filter(pc.equal(rows["class_name"], self.class_name))
        return rows if self.sha256 is None else rows.filter(pc.equal(rows["sha256"], self.sha256))


def parse_barred(text: str, rows: pa.Table) -> Barred:
    """A barred box from `IMAGE:BOX`, the image one of these manifest rows (of all splits).

    IMAGE is a uri, the end of one (`wren/12.jpg`, `12.jpg`) or an image_id. `UserError` where there is no such
    training image, where there are several, and where the box isn't on it.
    """
    name, colon, box = text.rpartition(":")
    if not colon or not name or not re.fullmatch(r"all|\d+(\s*,\s*\d+){3}", box.strip()):
        raise UserError(f"--forbid {text}: expected {_FORM}")
    row = _image(text, name, rows)
    height, width = row["height"], row["width"]
    if box.strip() == "all":
        return Barred(row["uri"], row["sha256"], (0, 0, height, width))
    top, left, bottom, right = map(int, box.split(","))
    if not (top < bottom <= height and left < right <= width):
        raise UserError(
            f"--forbid {text}: {box} isn't a box on this image of {height} rows and {width} columns of pixels; "
            "expected top,left,bottom,right with top < bottom and left < right"
        )
    return Barred(row["uri"], row["sha256"], (top, left, bottom, right))


def barred_before(history: Sequence[Mapping[str, Any]]) -> list[Barred | BarredRegion]:
    """What the corrections in a bundle's history barred: it stays so."""
    steps = [step for entry in history for step in entry["steps"]]
    boxes = [each for step in steps for each in step.get("barred", [])]
    regions = [each for step in steps for each in step.get("regions", [])]
    return [
        *(Barred(each["uri"], each["sha256"], tuple(each["box"])) for each in boxes),
        *(BarredRegion(_region(each["region"]), each["class"], each["sha256"]) for each in regions),
    ]


def _region(recorded: Any) -> Region:
    return "background" if recorded == "background" else tuple(recorded)


@dataclass(frozen=True)
class Bars:
    """Which patches of the training images are barred.

    masks: by image_id, booleans in rows x columns of patches, for images with barred boxes only. shape: how many rows
    and columns of patches there are.
    """

    masks: Mapping[int, np.ndarray]
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        barred: Sequence[Barred | BarredRegion],
        rows: pa.Table,
        map_shape: tuple[int, int],
        prototype_shape: tuple[int, int],
    ) -> "Bars":
        """What lies there. rows: manifest rows; map_shape: rows and columns of the latent map, in cells."""
        rows_of_patches, columns = (c - p + 1 for c, p in zip(map_shape, prototype_shape, strict=True))
        masks: dict[int, np.ndarray] = {}
        for image_id, patches in _patches_barred(barred, rows, map_shape, prototype_shape):
            masks[image_id] = masks[image_id] | patches if image_id in masks else patches
        return cls(masks, (rows_of_patches, columns))

    def holding(self, places: Sequence[Place]) -> list[int]:
        """Which of these patches are barred."""
        found = enumerate(places)
        return [p for p, (image, row, column) in found if image in self.masks and self.masks[image][row, column]]

    def free(self, image_ids: Iterable[int]) -> int:
        """How many patches of these images aren't barred."""
        whole = self.shape[0] * self.shape[1]
        return sum(whole - int(self.masks[image].sum()) if image in self.masks else whole for image in image_ids)

    def with_places(self, places: Iterable[Place]) -> "Bars":
        """Some more patches barred."""
        masks = {image: mask.copy() for image, mask in self.masks.items()}
        for image, row, column in places:
            masks.setdefault(image, np.zeros(self.shape, dtype=bool))[row, column] = True
        return Bars(masks, self.shape)


def _patches_barred(
    barred: Sequence[Barred | BarredRegion],
    rows: pa.Table,
    map_shape: tuple[int, int],
    prototype_shape: tuple[int, int],
) -> Iterator[tuple[int, np.ndarray]]:
    """image_id and the patches that are barred on it, by one bar after another."""
    shape = (map_shape, prototype_shape)
    boxes = [each for each in barred if isinstance(each, Barred)]
    images = rows.filter(pc.is_in(rows["sha256"], value_set=pa.array([each.sha256 for each in boxes], pa.string())))
    for image in images.select(["image_id", "sha256", "height", "width"]).to_pylist():
        for each in boxes:
            if each.sha256 == image["sha256"]:
                yield image["image_id"], patches_on(each.box, (image["height"], image["width"]), *shape)
    for region in barred:
        if isinstance(region, Barred):
            continue
        if region.region == "background":
            for image in region.of(rows).select(["image_id", "parts", "object"]).to_pylist():
                yield image["image_id"], _off_object(image["parts"], image["object"], *shape)
            continue
        top, left, bottom, right = region.region
        inner = (top + _EDGE, left + _EDGE, bottom - _EDGE, right - _EDGE)
        patches = patches_on(inner, (1, 1), *shape)
        yield from ((image_id, patches) for image_id in region.of(rows)["image_id"].to_pylist())


def _off_object(
    parts: Any, grid: bytes | None, map_shape: tuple[int, int], prototype_shape: tuple[int, int]
) -> np.ndarray:
    """Patches of which nothing lies on what the image shows."""
    rows, columns = (c - p + 1 for c, p in zip(map_shape, prototype_shape, strict=True))
    y, x = (((np.arange(cells * _SAMPLES) + 0.5) / (cells * _SAMPLES)) for cells in map_shape)
    places_N2 = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    on_N = on_object(places_N2, parts, grid)
    if on_N is None:
        return np.zeros((rows, columns), dtype=bool)
    samples = on_N.reshape(map_shape[0], _SAMPLES, map_shape[1], _SAMPLES)
    cells = samples.any(axis=(1, 3))
    windows = np.lib.stride_tricks.sliding_window_view(cells, prototype_shape)
    return np.logical_not(windows.any(axis=(2, 3)))


def patches_on(
    box: Sequence[float], size: tuple[int, int], map_shape: tuple[int, int], prototype_shape: tuple[int, int]
) -> np.ndarray:
    """Which patches of an image of `size` (height, width) lie on a box: booleans in rows x columns of patches."""
    sides = zip((box[::2], box[1::2]), size, map_shape, prototype_shape, strict=True)
    down, across = (_meets(interval, side, cells, patch) for interval, side, cells, patch in sides)
    return down[:, None] & across


def _meets(interval: Sequence[float], side: int, cells: int, patch: int) -> np.ndarray:
    """Which patches along one side of an image, `side` pixels long, overlap the interval of pixels; exact in integers."""
    first = np.arange(cells - patch + 1)
    return (first * side < interval[1] * cells) & ((first + patch) * side > interval[0] * cells)


def _image(text: str, name: str, rows: pa.Table) -> dict[str, Any]:
    """The training row that a user means."""
    training = rows.filter(pc.equal(rows["split"], "train"))
    found = _named(name, training)
    if len(found) == 1:
        row: dict[str, Any] = found.to_pylist()[0]
        return row
    if len(found):
        some = [f"{row['uri']} (image_id {row['image_id']})" for row in found.slice(0, _SHOWN).to_pylist()]
        raise UserError(
            f"--forbid {text}: {len(found)} training images are called {name}: {', '.join(some)}"
            f"{' …' if len(found) > _SHOWN else ''}; give more of the uri, or the image_id"
        )
    if len(elsewhere := _named(name, rows)):
        split = elsewhere["split"][0].as_py()
        raise UserError(f"--forbid {text}: {name} is a {split} image; prototypes are patches of training images only")
    raise UserError(f"--forbid {text}: there is no training image {name}; {_nearest(name, training)}")


def _named(name: str, rows: pa.Table) -> pa.Table:
    """Rows with this uri, else with this image_id, else whose uri (with or without its crop) ends with the name."""
    uris = rows["uri"].to_pylist()
    plain = [uri.partition("#")[0] for uri in uris]
    tests = (
        [uri == name for uri in uris],
        [str(image_id) == name for image_id in rows["image_id"].to_pylist()],
        [
            f"/{uri}".endswith(f"/{name}") or f"/{bare}".endswith(f"/{name}")
            for uri, bare in zip(uris, plain, strict=True)
        ],
    )
    matches = next((test for test in tests if any(test)), tests[0])
    return rows.filter(pa.array(matches, pa.bool_()))


def _nearest(name: str, rows: pa.Table) -> str:
    """What was probably meant: compared with as much of the end of each uri as was given."""
    parts = name.count("/") + 1
    by_end = {"/".join(uri.split("/")[-parts:]): uri for uri in rows["uri"].to_pylist()}
    near = difflib.get_close_matches(name, by_end, n=_SHOWN)
    if near:
        return f"the nearest names are {', '.join(by_end[end] for end in near)}"
    return f"one of them is {next(iter(by_end.values()))}" if by_end else "there is none at all"
