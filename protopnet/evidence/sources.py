"""Where the prototypes of a bundle come from, as far as it may be told: the one place where that is decided.

full    the location of the training image as the bundle records it
names   its name: the location relative to the data's root, without the path or bucket above it
none    nothing of the training image but the prototype: no name, no hash, and what surrounds the crop is grey
"""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from PIL import Image
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from protopnet.model.prototype_table import PrototypeTable
from protopnet.pages import pictures

Box = tuple[int, int, int, int]
Named = Literal["full", "names", "none"]

_TOLD = ["image_id", "uri", "sha256", "width", "height", "box", "row", "column", "self_similarity"]
_IDENTIFYING = dict.fromkeys(("image_id", "uri", "sha256"))
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Shown:
    """What of training images may be shown. crops_only: of the pictures nothing but the prototypes themselves."""

    sources: Named = "names"
    crops_only: bool = False


class Source(BaseModel):
    """The training image a prototype is a patch of."""

    model_config = ConfigDict(frozen=True)

    image_id: int | None = Field(description="null with `sources: none`, as are uri and sha256")
    uri: str | None = Field(
        description="name of the image relative to the data's root; with `sources: full` its location",
        examples=["Blue_Jay/0014.jpg"],
    )
    sha256: str | None = Field(description="of the encoded image")
    width: int
    height: int
    box: Box = Field(description="top, left, bottom, right of the prototype in pixels of the training image")
    row: int = Field(description="of the patch on the latent map")
    column: int
    self_similarity: float = Field(description="similarity of the prototype to its own patch: the most there can be")
    thumbnail: Base64Bytes | None = Field(None, description="JPEG of the training image, where asked for")


class Sources:
    """Of the prototypes of one bundle. What it doesn't record is None."""

    def __init__(self, table: PrototypeTable | None, provenance: Mapping[str, Any], shown: Shown) -> None:
        self._table, self._shown = table, shown
        self._root = _root(provenance)

    def of(self, prototype: int) -> Source | None:
        if self._table is None:
            return None
        row = {name: self._table.small[name][prototype].as_py() for name in _TOLD}
        return Source(**row | (_IDENTIFYING if self._shown.sources == "none" else {"uri": self._told(row["uri"])}))

    def uris(self) -> pa.Array | None:
        """What is told of all of them, for bulk work."""
        if self._table is None:
            return None
        if self._shown.sources == "none":
            return pa.nulls(len(self._table.small), pa.string())
        return pa.array(map(self._told, self._table.small["uri"].to_pylist()), pa.string())

    def pictured(self, prototype: int) -> bool:
        """Whether there is a picture, without reading it."""
        return self._table is not None and self._table.is_pictured(prototype)

    def thumbnail(self, prototype: int) -> bytes | None:
        """JPEG of the training image, or of as much of it as may be shown."""
        jpeg = self._table.picture(prototype) if self._table is not None else None
        if jpeg is None or not (self._shown.crops_only or self._shown.sources == "none"):
            return jpeg
        source = self.of(prototype)
        assert source is not None  # as there is a picture
        whole = pictures.opened(jpeg)
        place = pictures.place(source.box, (source.width, source.height), whole.size)
        shown = Image.new("RGB", whole.size, _GREY)
        shown.paste(whole.crop(place), place)
        return pictures.encoded(shown)

    def called(self, prototype: int) -> dict[str, str | None]:
        """`name` and `group` that people gave the prototype."""
        if self._table is None:
            return {}
        return {name: self._table.small[name][prototype].as_py() for name in ("name", "group")}

    def self_activation(self, prototype: int) -> list[list[float]] | None:
        """Similarities of a prototype to the patches of the image it comes from, row by row."""
        return self._table.activation_map(prototype) if self._table is not None else None

    def _told(self, uri: str | None) -> str | None:
        return uri if uri is None or self._shown.sources == "full" else name_below(uri, self._root)


def name_below(uri: str, root: str | None) -> str:
    """A location relative to the data's root; where it isn't below it, the file and the folder it is in.

    What is relative already stays as it is, unless it leads upwards.
    """
    path = uri.removeprefix("file://").replace("\\", "/")
    if not _is_absolute(path) and ".." not in path.split("/"):
        return path
    if root is not None and path.startswith(f"{root}/"):
        return path[len(root) :].lstrip("/")
    scheme, found, rest = path.rpartition("://")
    if scheme in ("http", "https"):
        rest = rest.split("?")[0]  # may be a key that opens it
    pieces = [piece for piece in rest.split("/") if piece not in ("", "..")]
    below = pieces[1:] if found else pieces  # without the bucket or host
    return "/".join(below[-2:])


def _is_absolute(path: str) -> bool:
    return path.startswith(("/", "~")) or "://" in path or path[1:3] == ":/"


def _root(provenance: Mapping[str, Any]) -> str | None:
    """Of the data that a bundle was trained on, where it is recorded as an absolute location."""
    path = provenance.get("data", {}).get("path")
    if not isinstance(path, str) or not _is_absolute(path):
        return None
    return posixpath.normpath(path) if "://" not in path else path.rstrip("/")
