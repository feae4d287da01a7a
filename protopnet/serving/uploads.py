"""From the body of a request to pixels: counted while it comes in, decoded in threads, never fetched from anywhere."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from protopnet import imaging
from protopnet.serving.refusals import Refusal
from protopnet.serving.settings import AppSettings

_FIELDS = 32  # of a form beside its files


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


async def read_uploads(request: Request, settings: AppSettings) -> list[Upload]:
    """The images of a request: its raw body, or the files of its form.

    Raises `Refusal`; a body that is too large is refused by its Content-Length, or as soon as it has become too large.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:19]) > settings.max_bytes:
        raise _too_many_bytes(settings)
    counted = Request(request.scope, _counting(request.receive, settings))
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        uploads = await _files(counted, settings)
    else:
        data = await counted.body()
        uploads = [Upload(None, data)] if data else []
    if not uploads:
        raise Refusal("bad_request", "no image: send it as the body, or as a file of a multipart/form-data form")
    return uploads


def decode(upload: Upload, sizes: Sequence[int], max_pixels: int) -> Picture:
    """To the inputs of the members; runs in any thread. Raises `Refusal`."""
    try:
        image = imaging.decode(upload.data, max_pixels=max_pixels)
        pixels = {size: imaging.resize(image, size) for size in sizes}
        return Picture(upload.file, image.width, image.height, pixels)
    except imaging.BadImage as bad:
        about = f"{upload.file}: " if upload.file else ""
        if bad.kind == "too-large":
            raise Refusal("too_many_pixels", f"{about}more than {max_pixels:,} pixels; send a smaller image") from None
        code = "not_an_image" if bad.kind == "unknown" else "bad_image"
        raise Refusal(code, f"{about}{bad.reason}") from None


def _counting(receive: Receive, settings: AppSettings) -> Receive:
    """The same messages, until they are too many bytes."""
    count = 0

    async def counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > settings.max_bytes:
            raise _too_many_bytes(settings)
        return message

    return counted


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


def _too_many_bytes(settings: AppSettings) -> Refusal:
    return Refusal("too_many_bytes", f"the body has more than {settings.max_bytes:,} bytes; send a smaller image")
