"""Is a dataset fit to be trained on? Asked once, before anything expensive begins."""

import pyarrow as pa
import pyarrow.compute as pc

from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError

_NAMED = 3  # how many bad images a message names


def check_dataset(dataset: Dataset, max_bad: float) -> None:
    """`UserError` naming what is wrong: too many bad images (a share above `data.max_bad`), no image at all,
    a single class, a class without a training image."""
    where = dataset.source.get("shards") or dataset.source.get("path") or "generated birds"
    good = dataset.table.num_rows
    check_bad_share(str(where), good, dataset.errors, max_bad)
    if not good:
        raise UserError(f"{where} holds no images (data.path); expected one sub-folder of images a class")
    if len(dataset.classes) < 2:
        raise UserError(
            f"{where} has one class only ({dataset.classes[0]!r}); a classifier needs two or more "
            "(data.path, data.classes)"
        )
    _check_every_class_trains(dataset, str(where))


def _check_every_class_trains(dataset: Dataset, where: str) -> None:
    trained = set(dataset.split("train")["label"].unique().to_pylist())
    empty = [name for label, name in enumerate(dataset.classes) if label not in trained]
    if not empty:
        return
    others = f" (and {len(empty) - 1} more classes)" if len(empty) > 1 else ""
    bad = dataset.errors.filter(pc.equal(dataset.errors["class_name"], empty[0]))
    reason = f": {bad.num_rows} can't be used, e.g. {_first_errors(bad)}" if bad.num_rows else ""
    raise UserError(
        f"{where}: class {empty[0]!r} has no training image{others}{reason}; add images, remove "
        "the class, or choose others with data.classes"
    )


def check_bad_share(where: str, good: int, errors: pa.Table, max_bad: float) -> None:
    """`UserError` naming the first bad images if their share is above max_bad."""
    bad = errors.num_rows
    if bad > max_bad * (good + bad):
        raise UserError(
            f"{where}: {bad} of {good + bad} images can't be used, more than data.max_bad "
            f"({max_bad:g}) allows: {_first_errors(errors)}"
        )


def _first_errors(errors: pa.Table) -> str:
    named = "; ".join(f"{error['uri']} ({error['reason']})" for error in errors.slice(0, _NAMED).to_pylist())
    return named + ("; …" if errors.num_rows > _NAMED else "")
