"""Where on an image a prototype sees itself, as one point, and which key points lie near it.

Places are (y, x) in fractions of the image's height and width, as key points are, so that the size of the network's
input and the image's aspect ratio don't matter. A map that is the same everywhere points nowhere: NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from protopnet.model.boxes import upsample

# Half the side of the box around a place, as a share of the image: 72 x 72 and 32 x 32 pixels of 224 x 224.
BOX, PATCH = 36 / 224, 16 / 224

_ROUNDING = 1e-9  # what lies on the edge of a box is in it
_CHUNK = 64  # enlarged maps that fit the cache
_GRID = 112  # points a side, for the share of an image that boxes cover


class PartPoint(NamedTuple):
    """A key point, in fractions of the image."""

    part: str
    y: float
    x: float


def peaks(maps_NHW: Tensor, size: int) -> np.ndarray:
    """The highest pixel (its middle) of each map enlarged to size x size, the first of equal ones: N x 2."""
    places_N2 = np.full((len(maps_NHW), 2), np.nan)
    for start in range(0, len(maps_NHW), _CHUNK):
        maps_nHW = maps_NHW[start : start + _CHUNK]
        flat_n = (maps_nHW.flatten(1).amax(1) == maps_nHW.flatten(1).amin(1)).cpu().numpy()
        pixel_n = upsample(maps_nHW, size, size).flatten(1).argmax(1).cpu().numpy()
        middles_n2 = (np.stack([pixel_n // size, pixel_n % size], axis=1) + 0.5) / size
        middles_n2[flat_n] = np.nan
        places_N2[start : start + _CHUNK] = middles_n2
    return places_N2


def middles(index_N: np.ndarray, map_shape: tuple[int, int], latent_shape: tuple[int, int]) -> np.ndarray:
    """The middle of each patch, by its row-major index among `map_shape` patches of a latent map: N x 2.

    A patch is a cell of the map, or several where prototypes are larger; the latent map covers the image.
    """
    corner_N2 = np.stack([index_N // map_shape[1], index_N % map_shape[1]], axis=1)
    extent_2 = np.asarray(latent_shape) - np.asarray(map_shape) + 1  # cells of a prototype
    return (corner_N2 + extent_2 / 2) / np.asarray(latent_shape)


def parts_near(places_N2: np.ndarray, points: Sequence[PartPoint], names: Sequence[str], half: float) -> np.ndarray:
    """Which of the named parts have a key point within `half` of each place, along both axes: bool, N x names."""
    hits_NS = np.zeros((len(places_N2), len(names)), dtype=bool)
    for point in points:
        away_N2 = np.abs(places_N2 - (point.y, point.x))
        hits_NS[:, names.index(point.part)] |= (away_N2 <= half + _ROUNDING).all(1)
    return hits_NS


def covered(points: Sequence[PartPoint], half: float) -> float:
    """Share of the image from which some key point is within `half`: how often a place taken at random would hit."""
    middles_G = (np.arange(_GRID) + 0.5) / _GRID
    grid_G2 = np.stack(np.meshgrid(middles_G, middles_G, indexing="ij"), axis=-1).reshape(-1, 2)
    names = sorted({point.part for point in points})
    return float(parts_near(grid_G2, points, names, half).any(1).mean())


def visible(points: Sequence[PartPoint], names: Sequence[str]) -> np.ndarray:
    """Which of the named parts have a key point: bool, one a name."""
    present = {point.part for point in points}
    return np.array([name in present for name in names], dtype=bool)


def without_sides(points: Sequence[PartPoint]) -> list[PartPoint]:
    """Left and right of a part made one: `left eye` and `right eye` are both `eye`."""
    return [PartPoint(_without_side(point.part), point.y, point.x) for point in points]


def _without_side(part: str) -> str:
    for side in ("left", "right"):
        if part.startswith((f"{side} ", f"{side}_")):
            return part[len(side) + 1 :]
    return part
