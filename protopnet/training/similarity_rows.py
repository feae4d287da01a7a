"""The similarity rows of one node in one matrix a split: numpy and Arrow, no Ray.

Blocks are read twice, one after another: what their rows are, which says where each row goes, then the similarities,
copied there a batch at a time. So these are in memory once beside the blocks, and in one order whatever the blocks.

Legend: n rows (an image, or one augmented copy of it), P prototypes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from protopnet.tables import from_bytes, to_bytes

_KEYS = ["image_id", "copy", "label", "split"]


class Rows(NamedTuple):
    """Of one split, by image and copy; the matrix column after column in memory, as the solver reads it."""

    similarities_nP: np.ndarray
    labels_n: np.ndarray


def rows_by_split(
    blocks: Sequence[Callable[[], pa.Table]], columns: np.ndarray | None = None, half: bool = False
) -> dict[str, Rows]:
    """All rows of `SimilarityTask`'s tables; there is always a split `train`. columns: the prototypes that count, in this
    order; all when None. half: the training rows in float16."""
    keys = pa.concat_tables([from_bytes(to_bytes(read().select(_KEYS))) for read in blocks])  # copies: blocks can go
    size = blocks[0]().schema.field("similarities").type.list_size
    width = size if columns is None else len(columns)
    split_n = np.array(keys["split"].to_pylist(), dtype=object)
    order_n = np.lexsort((keys["copy"].to_numpy(), keys["image_id"].to_numpy()))  # blocks end in any order
    place_n, labels_n, found = np.empty(len(keys), np.int64), keys["label"].to_numpy(), {}
    for name in dict.fromkeys(["train", *split_n]):
        rows = order_n[split_n[order_n] == name]
        place_n[rows] = np.arange(len(rows))
        kept = np.float16 if half and name == "train" else np.float32
        found[name] = Rows(np.empty((len(rows), width), kept, order="F"), labels_n[rows])
    first = 0
    for read in blocks:
        for batch in read()["similarities"].chunks:
            values_mP = batch.flatten().to_numpy().reshape(len(batch), size)
            here = slice(first, first + len(batch))
            for name in dict.fromkeys(split_n[here]):
                rows = np.flatnonzero(split_n[here] == name)
                picked_mP = values_mP[rows] if columns is None else values_mP[np.ix_(rows, columns)]
                found[name].similarities_nP[place_n[here][rows]] = picked_mP
            first += len(batch)
    return found
