"""Patches that no prototype may stand for: `IMAGE:BOX` as people write it, and the patches that lie on such a box.

A patch *lies on* a box when the part of the image that its latent cells cover, as if the latent map lay over the
image, has any area in common with the box. (What the patch can see, its receptive field, is larger.) Boxes are (top,
left, bottom, right), half-open, in pixels of the original image after its EXIF turn.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protopnet.errors import UserError
from protopnet.explain.pruning import Place

Box = tuple[int, int, int, int]
_FORM = "IMAGE:top,left,bottom,right in pixels of the image, or IMAGE:all"
_SHOWN = 3  # names that an error lists


@dataclass(frozen=True)
class Barred:
    """A box on a training image."""

    image_id: int
    uri: str
    box: Box


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
        return Barred(row["image_id"], row["uri"], (0, 0, height, width))
    top, left, bottom, right = map(int, box.split(","))
    if not (top < bottom <= height and left < right <= width):
        raise UserError(
            f"--forbid {text}: {box} isn't a box on this image of {height} rows and {width} columns of pixels; "
            "expected top,left,bottom,right with top < bottom and left < right"
        )
    return Barred(row["image_id"], row["uri"], (top, left, bottom, right))


def barred_patches(
    barred: Iterable[Barred], rows: pa.Table, map_shape: tuple[int, int], prototype_shape: tuple[int, int]
) -> dict[int, np.ndarray]:
    """Which patches of each barred image lie on one of its boxes: by image_id, booleans in rows x columns of patches.

    map_shape: of the latent map, in cells. rows: manifest rows with those images.
    """
    sizes = zip(rows["image_id"].to_pylist(), rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True)
    size_of = {image_id: size for image_id, *size in sizes}
    masks: dict[int, np.ndarray] = {}
    for each in barred:
        (top, left, bottom, right), sides = each.box, size_of[each.image_id]
        across = [
            _meets(interval, cells, patch, side)
            for interval, cells, patch, side in zip(
                ((top, bottom), (left, right)), map_shape, prototype_shape, sides, strict=True
            )
        ]
        mask = across[0][:, None] & across[1]
        masks[each.image_id] = masks.get(each.image_id, np.zeros_like(mask)) | mask
    return masks


def bar_places(masks: dict[int, np.ndarray], places: Iterable[Place], shape: tuple[int, int]) -> dict[int, np.ndarray]:
    """The same masks with some more patches barred. shape: rows and columns of patches."""
    more = {image_id: mask.copy() for image_id, mask in masks.items()}
    for image_id, row, column in places:
        more.setdefault(image_id, np.zeros(shape, dtype=bool))[row, column] = True
    return more


def on_barred(places: Sequence[Place], masks: Mapping[int, np.ndarray]) -> list[int]:
    """Which of these patches are barred."""
    return [p for p, (image, row, column) in enumerate(places) if image in masks and masks[image][row, column]]


def _meets(interval: tuple[int, int], cells: int, patch: int, side: int) -> np.ndarray:
    """Which patches along one side of an image of `side` pixels overlap the interval of pixels; in whole numbers."""
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
    """What was probably meant: by the last part of the uri, which is what people copy."""
    by_name = {uri.rpartition("/")[2]: uri for uri in rows["uri"].to_pylist()}
    near = difflib.get_close_matches(name.rpartition("/")[2], by_name, n=_SHOWN, cutoff=0.0)
    return f"the nearest names are {', '.join(by_name[leaf] for leaf in near)}" if near else "there is none at all"
