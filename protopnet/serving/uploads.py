"""From the body of a request to pixels: taken apart, measured, decoded in threads, never fetched from anywhere."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from protopnet import imaging
from protopnet.config import IntensitySettings
from protopnet.serving.refusals import Refusal
from protopnet.serving.settings import AppSettings

_FIELDS = 32  # of a form beside its files
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Upload:
    """An encoded image as it came."""

    file: str | None
    data: bytes


@dataclass(frozen=True)
class Picture:
    """A decoded image. `width`, `height`: as uploaded, after its EXIF turn. `pixels`: S x S x 3 by the size S."""

    file: str | None
    width: int
    height: int
    pixels: Mapping[int, np.ndarray]


async def uploads_in(request: Request, body: bytes, settings: AppSettings) -> list[Upload]:
    """The images of a body: it is one, or a form with files. Raises `Refusal`."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        uploads = await _files(Request(request.scope, _replayed(body)), settings)
    else:
        uploads = [Upload(None, body)] if body else []
    if not uploads:
        raise Refusal("bad_request", "no image: send it as the body, or as a file of a multipart/form-data form")
    return uploads


def measure(uploads: Sequence[Upload], settings: AppSettings) -> list[int]:
    """Pixels of each, from its header; runs in any thread. Raises `Refusal`."""
    pixels: list[int] = []
    for upload in uploads:
        width, height = _or_refused(upload, settings, imaging.measure)
        pixels.append(width * height)
    if sum(pixels) > settings.max_total_pixels:
        raise Refusal(
            "too_many_pixels",
            f"{sum(pixels):,} pixels in all images together, more than max_total_pixels "
            f"({settings.max_total_pixels:,}); send fewer at a time, or smaller ones",
        )
    return pixels


def decode(
    upload: Upload,
    sizes: Sequence[int],
    settings: AppSettings,
    intensity: IntensitySettings = imaging.AS_THE_FILE_SAYS,
) -> Picture:
    """To the inputs of the members; runs in any thread. Raises `Refusal`."""
    image = _or_refused(upload, settings, partial(imaging.decode, intensity=intensity))
    pixels = {size: imaging.resize(image, size) for size in sizes}
    return Picture(upload.file, image.width, image.height, pixels)


def _or_refused(upload: Upload, settings: AppSettings, work: Callable[..., _Found]) -> _Found:
    try:
        return work(upload.data, max_pixels=settings.max_pixels)
    except imaging.BadImage as bad:
        about, most = f"{upload.file}: " if upload.file else "", settings.max_pixels
        if bad.kind == "too-large":
            raise Refusal("too_many_pixels", f"{about}more than {most:,} pixels; send a smaller image") from None
        code = "not_an_image" if bad.kind == "unknown" else "bad_image"
        raise Refusal(code, f"{about}{bad.reason}") from None


def _replayed(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _files(request: Request, settings: AppSettings) -> list[Upload]:
    try:
        form = await request.form(max_files=settings.max_images, max_fields=_FIELDS)
    except HTTPException as error:  # what Starlette makes of a broken form
        if str(error.detail).startswith("Too many files"):
            raise Refusal("too_many_images", f"at most {settings.max_images} images in one request") from None
        raise Refusal("bad_request", f"broken multipart body: {error.detail}") from None
    try:
        return [upload async for upload in _uploads(form.multi_items())]
    finally:
        await form.close()


async def _uploads(items: list[tuple[str, UploadFile | str]]) -> AsyncIterator[Upload]:
    for name, item in items:
        if isinstance(item, str):
            raise Refusal(
                "bad_option", f"the form's field {name!r} isn't a file; options are query parameters (?top_classes=3)"
            )
        if data := await item.read():
            yield Upload(item.filename or None, data)
