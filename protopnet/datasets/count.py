"""How many images there would be, without reading one: for a plan, before a run."""

from collections import Counter
from dataclasses import dataclass

from protopnet import storage
from protopnet.config import DataSettings, RunSettings
from protopnet.datasets.cub import cub_classes, cub_splits
from protopnet.datasets.folders import Found, list_images
from protopnet.datasets.lists import labelled
from protopnet.datasets.shards import open_shards
from protopnet.datasets.splits import chosen_classes, share_of
from protopnet.errors import UserError


@dataclass(frozen=True)
class Images:
    """How many images a run has, and of how many classes."""

    train: int
    validation: int
    test: int
    classes: int


def count_images(settings: RunSettings) -> Images:
    """Images of each split; those of a folder by their names alone, so that bad ones are counted too. `UserError`."""
    data = settings.data
    if data.source == "shards":
        dataset = open_shards(str(data.path), data, settings.seed)
        counts = dataset.counts()
        return Images(counts["train"], counts["validation"], counts["test"], len(dataset.classes))
    found = _found(settings)
    test = _with_split(found, "test", data.test)
    validation = _with_split(found, "validation", data.validation)
    train = sum(number for (_, split), number in found.items() if split == "train")
    return Images(train, validation, test, len({name for name, _ in found}))


def _found(settings: RunSettings) -> Counter[tuple[str, str]]:
    """Number of images of each class and split that the source itself has."""
    data, birds = settings.data, settings.birds
    if data.source == "birds":
        names = chosen_classes([f"{number}" for number in range(birds.classes)], data.classes)
        train = {(name, "train"): birds.train_per_class for name in names}
        return Counter(train | {(name, "test"): birds.test_per_class for name in names})
    root = storage.located(str(data.path))
    if data.source == "list":
        images, names = labelled(root)
        return _of_classes(images, names, data)
    if not storage.is_folder(root):
        raise UserError(f"{data.path} isn't a folder (data.path)")
    if data.source == "cub":
        return Counter(cub_splits(root, cub_classes(root, data)))
    images, names, _ = list_images(root)
    return _of_classes(images, names, data)


def _of_classes(images: list[Found], names: list[str], data: DataSettings) -> Counter[tuple[str, str]]:
    chosen = set(chosen_classes(names, data.classes))
    return Counter((image.class_name, image.split) for image in images if image.class_name in chosen)


def _with_split(found: Counter[tuple[str, str]], name: str, share: float) -> int:
    """Images of a split, cut from the training images of each class where the source has none."""
    if share > 0 and not any(split == name for _, split in found):
        for (label, split), number in list(found.items()):
            if split == "train":
                found[label, name] = share_of(number, share)
                found[label, split] -= found[label, name]
    return sum(number for (_, split), number in found.items() if split == name)
