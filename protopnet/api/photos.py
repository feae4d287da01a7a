"""Images as a notebook has them (files, bytes, PIL images, arrays) -> upright RGB images.

All of them go through `imaging.decode`, so that an image gives the same scores however it is handed over.
"""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from protopnet import imaging, storage
from protopnet.config import IntensitySettings
from protopnet.errors import UserError

Photo: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]
"""One image: a path or `s3://…`, the bytes of a file, a PIL image, or an array: H x W, H x W x 3 or H x W x 4."""

_EXPECTED = (
    "a path, the bytes of a file, a PIL image, or an array: H x W x 3 or 4 of uint8, H x W of uint8, uint16, float32"
)
# PNG keeps what these modes hold, with the transparency of a palette; TIFF keeps the others.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

_ONE = (str, os.PathLike, bytes, Image.Image, np.ndarray)


@dataclass(frozen=True)
class Opened:
    """An image and what it is called: its file, or its place among those given."""

    name: str
    image: Image.Image


def is_one(given: object) -> bool:
    """Whether this is one image, not several."""
    return isinstance(given, _ONE) or not isinstance(given, Iterable)


def each(given: Photo | Iterable[Photo]) -> Iterable[Photo]:
    """The images of a list, or the one there is."""
    if isinstance(given, _ONE) or not isinstance(given, Iterable):
        return [given]
    return given


def open_photo(given: Photo, place: int, max_pixels: int, intensity: IntensitySettings) -> Opened:
    """Decode an image. place: among those given, from 0. `UserError` for what is no image or can't be read."""
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        data = _read(name)
    else:
        name = f"image {place + 1}"
        data = given if isinstance(given, bytes) else _encoded(given, name)
    try:
        return Opened(name, imaging.decode(data, max_pixels=max_pixels, intensity=intensity))
    except imaging.BadImage as bad:
        raise UserError(f"{name} can't be used: {bad.reason}") from bad


def _read(uri: str) -> bytes:
    if storage.is_folder(uri):
        raise UserError(f"{uri} is a folder: expected the file of an image")
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        raise UserError(f"there is no file {uri}: expected that of an image") from None


def _encoded(given: object, name: str) -> bytes:
    """The pixels and the EXIF turn of an image in memory as a file, without loss."""
    image = given if isinstance(given, Image.Image) else _of_array(given, name)
    sink, turn = io.BytesIO(), Image.Exif()
    try:
        image.load()  # before its EXIF is asked for: PIL turns TIFFs by itself
        turn[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        kind = "PNG" if image.mode in _PNG_MODES else "TIFF"
        image.save(sink, kind, exif=turn, **({"compress_level": 1} if kind == "PNG" else {}))
    except (OSError, ValueError, SyntaxError) as error:  # cut off, closed, or of a mode that no file has
        raise UserError(f"{name} can't be used: {error}") from error
    return sink.getvalue()


def _of_array(given: object, name: str) -> Image.Image:
    if not isinstance(given, np.ndarray):
        raise UserError(f"{name} is a {type(given).__name__}: expected {_EXPECTED}")
    grey, colour = given.ndim == 2, given.ndim == 3 and given.shape[2] in (3, 4)
    fits = (grey or colour) if given.dtype == np.uint8 else grey and given.dtype in (np.uint16, np.float32)
    if not given.size or not fits:
        raise UserError(f"{name} is an array of {given.dtype}, {given.shape}: expected {_EXPECTED}")
    return Image.fromarray(np.ascontiguousarray(given))
