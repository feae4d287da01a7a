"""Which files below a folder are images, and what else lies there: for training, preparing and scoring alike.

What systems leave behind (a Mac's `__MACOSX/`, a camera card's or a NAS's folders, `Thumbs.db`, everything hidden)
is never an image or a class, whatever its suffix; it is counted, so that nothing goes without a word.
"""

import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

from protopnet.words import counted, first_few

# Also kinds that can't be decoded here (JPEG XL, HEIC without its extra): better named among the errors than passed over.
_KINDS = "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff ppm pgm pbm pnm jp2 j2k avif heic heif jxl"
_DICOM = " dcm dicom" if importlib.util.find_spec("pydicom") else ""
SUFFIXES = frozenset(f".{kind}" for kind in (_KINDS + _DICOM).split())

_LEFTOVERS = frozenset(
    [
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "lost+found",
        "recycler",
        "$recycle.bin",
        "system volume information",
        "network trash folder",
        "temporary items",
        "__pycache__",
    ]
)


def is_leftover(name: str) -> bool:
    """True for the name of a file or folder that a system, not a person, has put there; also for hidden ones."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


@dataclass
class Passed:
    """Files that weren't taken for images: leftovers by name, others by suffix, and images that belong to no class."""

    leftovers: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    outside: int = 0

    def images_among(self, paths: Iterable[str], more: Set[str] = frozenset()) -> Iterator[str]:
        """The images of a folder's files (paths relative to it), in the same order; all else is counted here.

        more: suffixes that are wanted beside those of images.
        """
        self.leftovers.clear()
        self.others.clear()
        for path in paths:
            pieces = path.split("/")
            leftover = next((piece for piece in pieces if is_leftover(piece)), None)
            suffix = os.path.splitext(path)[1].lower()
            if leftover is not None:
                self.leftovers[leftover] += 1
            elif suffix in SUFFIXES or suffix in more:
                yield path
            else:
                self.others[suffix] += 1

    def text(self) -> str | None:
        """What a person should know of, in one line; None if there is nothing."""
        said = []
        if self.leftovers:
            number = counted(self.leftovers.total(), "leftover file")
            said.append(f"{number} of systems ignored ({_most(self.leftovers)})")
        if self.outside:
            said.append(f"{counted(self.outside, 'image')} outside the class folders not used")
        return "; ".join(said) or None

    def instead_of_images(self) -> str:
        """What a folder without any image holds instead, and what to do about it; the end of an error's line."""
        if not self.others:
            return "expected images below it"
        kinds = _most(Counter({suffix or "no suffix": number for suffix, number in self.others.items()}))
        known = "images are known by their suffix (.jpg, .png, .tif, …)"
        return f"it holds other files only ({kinds}): {known}{self._advice()}"

    def _advice(self) -> str:
        if ".dcm" in self.others or ".dicom" in self.others:
            return "; DICOM is read after pip install 'protopnet[dicom]'"
        packed = [kind for kind in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") if kind in self.others]
        return f"; unpack the {packed[0]} files first" if packed else ""


def _most(counts: Counter[str]) -> str:
    in_order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return first_few([f"{name} {number:,}" for name, number in in_order], 4)
