"""Images that are in the training split and, with the same content, in another: they make any test look too good.

Content is what the `sha256` of the file says: copies under other names, in other classes too, are found in one look at
the table of rows. A picture that was saved anew or cropped isn't.
"""

from dataclasses import replace
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from protopnet.datasets.rows import Dataset
from protopnet.datasets.splits import renumbered
from protopnet.errors import UserError
from protopnet.words import counted, first_few

Duplicates = Literal["warn", "refuse", "drop"]

_NAMED = 3  # pairs that a line names


def duplicates_across(table: pa.Table) -> pa.Table:
    """A row a validation or test image that is a training image too (manifest rows given).

    Columns: sha256, split, uri, class_name of the held-out image; train_uri, train_class_name of the first of its
    copies in training.
    """
    is_training = pc.equal(table["split"], "train")
    training = table.filter(is_training).select(["sha256", "uri", "class_name"])
    held_out = table.filter(pc.invert(is_training)).select(["sha256", "split", "uri", "class_name"])
    first = pc.index_in(held_out["sha256"], value_set=training["sha256"].combine_chunks())
    repeated = pc.is_valid(first)
    copies = training.take(first.filter(repeated))
    return (
        held_out.filter(repeated)
        .append_column("train_uri", copies["uri"])
        .append_column("train_class_name", copies["class_name"])
        .combine_chunks()
    )


def duplicates_text(pairs: pa.Table) -> str | None:
    """The rows of `duplicates_across` in one line for people; None if there are none."""
    if not len(pairs):
        return None
    splits = " and ".join(sorted(pairs["split"].unique().to_pylist()))
    named = [
        f"{uri} is {copy}"
        for uri, copy in zip(*(pairs[name].to_pylist() for name in ("uri", "train_uri")), strict=True)
    ]
    number = counted(len(pairs), f"{splits} image")
    return f"{number} {'is' if len(pairs) == 1 else 'are'} in training too: {first_few(named, _NAMED)}"


def settled(dataset: Dataset, duplicates: Duplicates) -> tuple[Dataset, pa.Table]:
    """The dataset as `data.duplicates` wants it, and the duplicates that it had (`duplicates_across`).

    `drop` takes them out of the training split. `UserError` for `refuse` where there are any.
    """
    pairs = duplicates_across(dataset.table)
    if not len(pairs) or duplicates == "warn":
        return dataset, pairs
    if duplicates == "refuse":
        raise UserError(f"{duplicates_text(pairs)}; expected none with data.duplicates refuse: remove them, or drop")
    table = dataset.table
    leaks = pc.and_(
        pc.equal(table["split"], "train"), pc.is_in(table["sha256"], value_set=pairs["sha256"].combine_chunks())
    )
    kept = renumbered(table.filter(pc.invert(leaks)).combine_chunks())
    dropped = f"{counted(len(table) - len(kept), 'training image')} dropped that are held out too (data.duplicates)"
    said = [text for text in (dataset.source.get("passed_over"), dropped) if text]
    return replace(dataset, table=kept, source=dataset.source | {"passed_over": "; ".join(said)}), pairs
