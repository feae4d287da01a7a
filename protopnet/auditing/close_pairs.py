"""Prototypes that are close to each other, found in blocks: P x P distances are never held at once.

Distances between prototypes mean little by themselves: how far apart is "close" depends on the similarity, the depth and
how far training went. The yardstick is a prototype's *reach*: its mean distance to the nearest patch of images of its
own class. A relative distance of 1 says that two prototypes are as near as a prototype is to a typical image of its class.

Legend: P prototypes, C of a block, N neighbours kept.
"""

import numpy as np
import pyarrow as pa
import torch

from protopnet.model.prototypes import Kind, distance_maps

PAIR_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),  # the smaller number of the two
        ("other", pa.int32()),
        ("same_class", pa.bool_()),
        ("distance", pa.float64()),
        ("relative_distance", pa.float64()),  # to the smaller reach of the two
    ]
)
NEIGHBOURS = 10  # pairs kept for each prototype among its own class, and as many among the others: the nearest
_NUMBERS = 1 << 22  # distances held at a time


@torch.no_grad()
def close_pairs(
    prototypes_PDhw: torch.Tensor,
    prototype_class_P: np.ndarray,
    reach_P: np.ndarray,
    kind: Kind,
    *,
    within_class: float,
    across_classes: float,
    numbers: int = _NUMBERS,
) -> pa.Table:
    """PAIR_SCHEMA rows of pairs of a class no further apart than `within_class`, and of pairs of two classes no further
    apart than `across_classes` (relative distances), the nearest first. numbers: distances held at a time."""
    P = len(prototypes_PDhw)
    block = max(1, numbers // P)
    found = []
    for start in range(0, P, block):
        members = np.arange(start, min(start + block, P))
        maps_CP11 = distance_maps(prototypes_PDhw[start : start + block], prototypes_PDhw, kind)
        distance_CP = maps_CP11[:, :, 0, 0].cpu().numpy()
        yardstick_CP = np.minimum(reach_P[members][:, None], reach_P[None])
        same_CP = prototype_class_P[members][:, None] == prototype_class_P[None]
        for wanted_CP, limit in ((same_CP, within_class), (~same_CP, across_classes)):
            member, other = np.nonzero(wanted_CP & (distance_CP <= limit * yardstick_CP))
            distance, yardstick = distance_CP[member, other].astype(np.float64), yardstick_CP[member, other]
            relative = np.divide(distance, yardstick, out=np.zeros_like(distance), where=distance > 0)
            found.append(_nearest_few(members[member], other, relative))
    pairs_N3 = np.concatenate(found)
    low, high = pairs_N3[:, :2].min(1), pairs_N3[:, :2].max(1)
    keys, first = np.unique(np.stack([low, high], axis=1).astype(np.int64), axis=0, return_index=True)
    low_N, high_N, relative_N = keys[:, 0], keys[:, 1], pairs_N3[first, 2]
    return (
        pa.table(
            {
                "prototype": low_N,
                "other": high_N,
                "same_class": prototype_class_P[low_N] == prototype_class_P[high_N],
                "distance": relative_N * np.minimum(reach_P[low_N], reach_P[high_N]),
                "relative_distance": relative_N,
            }
        )
        .cast(PAIR_SCHEMA)
        .sort_by([("relative_distance", "ascending"), ("prototype", "ascending"), ("other", "ascending")])
    )


def _nearest_few(member_N: np.ndarray, other_N: np.ndarray, relative_N: np.ndarray) -> np.ndarray:
    """Of pairs sorted by member, the nearest few of each: rows of (member, other, relative distance)."""
    apart = np.flatnonzero(member_N != other_N)
    order = apart[np.lexsort((relative_N[apart], member_N[apart]))]
    place = np.arange(len(order)) - np.searchsorted(member_N[order], member_N[order])
    kept = order[place < NEIGHBOURS]
    return np.stack([member_N[kept], other_N[kept], relative_N[kept]], axis=1)
