"""Where the object is on an image, as people mark it: a mask beside the image, or a box.

What is kept of either is a grid of `GRID` x `GRID` cells over the whole image, whatever its shape, a bit a cell (512 bytes
a row, in the column `object`): coarse beside a mask, fine beside the cells of a latent map.
"""

import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from protopnet import storage
from protopnet.datasets.files import SUFFIXES, is_leftover
from protopnet.errors import UserError
from protopnet.words import counted

GRID = 64
_EXPECTED = "expected a picture of the image's size, 0 beside the object"


def packed(mask_YX: np.ndarray) -> bytes:
    """A mask (what is above half of its largest value is the object) as the bits of the grid."""
    on_YX = mask_YX > mask_YX.max() / 2
    share_GG = np.asarray(Image.fromarray(on_YX.astype(np.float32)).resize((GRID, GRID), Image.Resampling.BOX))
    # An object that fills half of no cell is where it fills most.
    return np.packbits(share_GG >= min(0.5, float(share_GG.max()))).tobytes()


def unpacked(grid: bytes) -> np.ndarray:
    """The grid (GRID, GRID) in rows from the top: True on the object."""
    return np.unpackbits(np.frombuffer(grid, np.uint8)).reshape(GRID, GRID).astype(bool)


def of_box(box: Sequence[float], size: tuple[int, int]) -> bytes:
    """The grid of a box (left, top, width, height in pixels) on an image of this size (width, height)."""
    (left, top, width, height), cells = box, np.arange(GRID) + 0.5
    across = _within(cells / GRID * size[0], left, left + width)
    down = _within(cells / GRID * size[1], top, top + height)
    return np.packbits(down[:, None] & across).tobytes()


def _within(middles: np.ndarray, low: float, high: float) -> np.ndarray:
    inside = (low <= middles) & (middles <= high)
    return inside if inside.any() else np.arange(GRID) == np.abs(middles - (low + high) / 2).argmin()


def on_mask(places_N2: np.ndarray, grid: bytes) -> np.ndarray:
    """Which places (x, y in fractions of the image) are on the object; none that is nowhere (NaN)."""
    known_N = ~np.isnan(places_N2).any(1)
    cells_N2 = (np.where(known_N[:, None], places_N2, 0) * GRID).astype(int).clip(0, GRID - 1)
    return known_N & unpacked(grid)[cells_N2[:, 1], cells_N2[:, 0]]


def places_on(grid: bytes) -> np.ndarray:
    """The middles of the cells on the object: N x 2, x and y in fractions of the image."""
    return (np.argwhere(unpacked(grid))[:, ::-1] + 0.5) / GRID


def read_mask(uri: str, size: tuple[int, int], box: Sequence[int] | None = None) -> bytes:
    """The grid of a mask. size: width and height of its image. box: the part of it that is taken, in pixels (left, top,
    right, bottom). `UserError` for a mask that can't be read, of another size, or without an object."""
    try:
        with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
            image.load()
            # A palette's colours are numbers of objects; of 16 bits convert("L") would keep white alone.
            plain = image if image.mode in ("P", "L", "1") or image.mode.startswith(("I", "F")) else image.convert("L")
            mask_YX = np.asarray(plain).astype(np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{uri}: this mask can't be read: {error} (data.masks)") from error
    if plain.size != size:
        raise UserError(
            f"{uri}: this mask has {plain.width} x {plain.height} pixels, its image {size[0]} x {size[1]} "
            f"(data.masks); {_EXPECTED}"
        )
    if plain.mode == "P":
        mask_YX = (mask_YX > 0).astype(np.float32)
    if not mask_YX.any():
        raise UserError(f"{uri}: this mask is empty (data.masks); {_EXPECTED}")
    if box is None:
        return packed(mask_YX)
    left, top, right, bottom = box
    cut_YX = np.where(mask_YX > mask_YX.max() / 2, 1, 0)[top:bottom, left:right]
    if not cut_YX.any():
        raise UserError(f"{uri}: nothing of this mask lies in the image's bounding box (data.masks, data.crop)")
    return packed(cut_YX)


def masks_for(folder: str, paths: Iterable[str]) -> dict[str, str]:
    """The mask of each image: the file below the folder with the image's path, whatever its suffix.

    `UserError` where the folder isn't there, or images have none.
    """
    root = storage.located(folder)
    if not storage.is_folder(root):
        raise UserError(f"{folder} isn't a folder (data.masks); expected a mask an image, with the image's own path")
    found = {}
    for uri in storage.list_files(root):
        path = uri[len(root) :].lstrip("/")
        stem, suffix = os.path.splitext(path)
        if suffix.lower() in SUFFIXES and not any(map(is_leftover, path.split("/"))):
            found[stem] = uri
    wanted = {path: os.path.splitext(path)[0] for path in paths}
    missing = [path for path, stem in wanted.items() if stem not in found]
    if missing:
        raise UserError(
            f"{folder} has no mask for {counted(len(missing), 'image')} of {len(wanted):,}, {missing[0]} the first "
            "(data.masks): expected a picture with the image's own path below it, of any suffix"
        )
    return {path: found[stem] for path, stem in wanted.items()}
