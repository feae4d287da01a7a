"""How the images of a folder lie: class folders, class folders below those of splits, or splits below each class.

    rose/1.jpg    train/rose/1.jpg    rose/train/1.jpg

Folders of splits are known by their usual names in any case. A class may have such a name too: it is one if classes
lie beside it. Where it could be either, the person decides: a `UserError` names the folder.
"""

from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass

from protopnet.errors import UserError
from protopnet.words import first_few

# Of lists and tables: names of columns, of which the first that is there counts.
URI_COLUMNS = ("uri", "path", "file", "image")
LABEL_COLUMNS = ("label", "class", "class_name", "category")
SPLIT_COLUMNS = ("split", "set", "subset")
MASK_COLUMNS = ("mask", "segmentation")
BOX_COLUMNS = ("box", "bbox", "bounding_box")

_NAMES = {
    "train": "train training trn",
    "validation": "val valid validation validate dev development",
    "test": "test testing tst eval evaluation evaluate holdout heldout",
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names.split()}
_ENDINGS = ("set", "data", "split", "images", "imgs")


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for: `Training`, `test_set`, `Valid`; None for any other name."""
    name = "".join(letter for letter in folder.casefold() if letter not in " _-.")
    endings = [name.removesuffix(ending) for ending in _ENDINGS]
    return next((_SPLIT_OF[short] for short in (name, *endings) if short in _SPLIT_OF), None)


@dataclass(frozen=True)
class Layout:
    """splits: by top folder; empty if the top folders are classes. below_classes: splits lie below each class."""

    splits: dict[str, str]
    below_classes: bool = False

    def place(self, path: str) -> tuple[str, str] | None:
        """Class and split of an image; None for one that belongs to no class."""
        folders = path.split("/")[:-1]
        if self.splits:
            split = self.splits.get(folders[0]) if folders else None
            return (folders[1], split) if split and len(folders) >= 2 else None
        if not folders:
            return None
        return folders[0], (split_of(folders[1]) or "train") if self.below_classes else "train"


def layout_of(images: list[str], tops: Set[str]) -> Layout:
    """The layout of images (paths relative to their folder) and top folders, those without images among them.

    `UserError` where a folder may be a split or a class.
    """
    below: dict[str, set[str]] = defaultdict(set)  # the folders with images directly below each top folder
    with_images: set[str] = set()  # the top folders with images directly in them
    for path in images:
        folders = path.split("/")[:-1]
        if len(folders) >= 2:
            below[folders[0]].add(folders[1])
        elif folders:
            with_images.add(folders[0])
    named = {top: split for top in sorted(tops) if (split := split_of(top))}
    holders = {top: split for top, split in named.items() if below[top]}
    others = sorted(top for top in tops if top not in named and (below[top] or top in with_images))
    if holders and _are_splits(holders, below, with_images, others):
        _refuse_repeated(holders)
        return Layout(holders)
    if len(named) > 1 and not others and with_images:
        raise UserError(
            f"{first_few(_slashed(named), 3)} hold images but no class folders (data.path): expected a folder for each "
            "class below them, as train/rose/1.jpg; rename them if they are classes"
        )
    return Layout({}, below_classes=_splits_below(images))


def _are_splits(holders: dict[str, str], below: dict[str, set[str]], with_images: Set[str], others: list[str]) -> bool:
    """Whether folders with the names of splits, which hold folders, are splits; `others` are beside them."""
    if not others:
        return True
    clean = [top for top in holders if top not in with_images]
    if not clean:
        return False
    first = below[clean[0]]
    if len(clean) > 1 and all(below[top] & first for top in clean[1:]):
        return True  # the same classes in each
    if any(split == "train" for split in (holders[top] for top in clean)) or any(
        below[top] & set(others) for top in clean
    ):
        raise UserError(
            f"{clean[0]}/ may be a split or a class, since {first_few(_slashed(others), 3)} beside it hold images too "
            f"(data.path): rename it if it is a class, or move the others out of the folder if it is a split"
        )
    return False


def _refuse_repeated(splits: dict[str, str]) -> None:
    for split in ("train", "validation", "test"):
        folders = [top for top, name in splits.items() if name == split]
        if len(folders) > 1:
            raise UserError(
                f"{' and '.join(_slashed(folders))} are both names of the {split} split (data.path): "
                "expected one folder for each split; join them or rename one"
            )


def _splits_below(images: list[str]) -> bool:
    """True if every image of a class lies in a folder of a split below it, and there is a training split."""
    seconds = {
        folders[1] if len(folders) >= 3 else "" for folders in (p.split("/") for p in images) if len(folders) >= 2
    }
    splits = [split_of(second) for second in seconds]
    return bool(splits) and all(splits) and "train" in splits


def _slashed(names: "Set[str] | dict[str, str] | list[str]") -> list[str]:
    return [f"{name}/" for name in names]
