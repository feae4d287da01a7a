"""Nearest latent patches of each prototype: the map and the reduce, without Ray.

One primitive serves the push (nearest patches of the prototype's own class), pruning and the audit (nearest
patches of any class, one an image). The map turns a batch of latent maps into a table of candidates; the
reduce keeps the best of any number of such tables. The order is lexicographic in (distance, image, row,
column), so the reduce is associative and commutative and its result doesn't depend on how the images were cut
into batches, shards or workers.

Candidates are measured in float64, from differences: whole maps of distances are rounded by the size of the norms,
which depends on the batch. What remains is the rounding of the latent maps themselves: they differ in their last
bits from one batch size to another, and `rounding` says how far a distance moves with them. With `spare`, candidates
beyond the k best are kept while rounding can't tell them from the k-th, so that a closer look finds all it needs.

Legend: B images, P prototypes, D channels, H W cells, L = H*W patches.
"""

import numpy as np
import pyarrow as pa
import torch

from protopnet.model.prototypes import Kind, distance_maps, paired_distances, patches

CANDIDATE_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),
        ("distance", pa.float64()),
        ("image_id", pa.int64()),
        ("label", pa.int32()),
        ("row", pa.int32()),
        ("column", pa.int32()),
        ("vector", pa.list_(pa.float32())),
    ]
)
_ORDER = [(name, "ascending") for name in ("prototype", "distance", "image_id", "row", "column")]

# Measured over batch sizes and threads on five networks, a channel of a latent map (in (0, 1)) moves by 1e-6 in the
# mean and 4e-6 at most; a squared distance d moves by up to 2 sqrt(d) times the length of all channels' movements.
_ROUNDING_ABSOLUTE, _ROUNDING_RELATIVE = 2e-6, 3e-5
_FLOAT32 = 5e-7  # relative error of the sums in `distance_maps`, generously
_MOST = 32  # candidates measured beyond those asked for
_NUMBERS = 1 << 22  # measured in float64 at a time


def rounding(distances: np.ndarray) -> np.ndarray:
    """Distances no further apart than this may be one number, from latent maps that were rounded differently."""
    return _ROUNDING_ABSOLUTE + _ROUNDING_RELATIVE * np.sqrt(np.abs(distances))


@torch.no_grad()
def local_nearest(
    latent_BDHW: torch.Tensor,
    image_ids_B: np.ndarray,
    labels_B: np.ndarray,
    prototypes_PDhw: torch.Tensor,
    kind: Kind,
    k: int,
    *,
    prototype_class_P: np.ndarray | None = None,
    one_per_image: bool = False,
    spare: int = 0,
) -> pa.Table:
    """The k nearest patches of each prototype among the images of one batch.

    With `prototype_class_P` a prototype sees only images of its own class, and prototypes of classes that are
    not in the batch emit nothing. Returns sorted CANDIDATE_SCHEMA rows, at most k a prototype (and up to `spare`
    more, see above), with the patch itself (D*h*w floats) as `vector`.
    """
    wanted_p = _prototypes_in_play(prototype_class_P, labels_B, len(prototypes_PDhw))
    if not len(wanted_p):
        return CANDIDATE_SCHEMA.empty_table()
    prototypes_pDhw = prototypes_PDhw[torch.from_numpy(wanted_p)]
    _, _, h, w = prototypes_PDhw.shape
    columns = latent_BDHW.shape[3] - w + 1
    distance_pBL = distance_maps(latent_BDHW, prototypes_pDhw, kind).flatten(2).transpose(0, 1).cpu().numpy()
    if prototype_class_P is not None:
        own_pB1 = (prototype_class_P[wanted_p][:, None] == labels_B)[:, :, None]
        distance_pBL = np.where(own_pB1, distance_pBL, np.inf)
    slack = _rounding_of_maps(latent_BDHW, prototypes_pDhw)
    which_n, image_n, patch_n = _within_reach(distance_pBL, k, spare, one_per_image, slack)
    vectors_nd = patches(latent_BDHW, h, w)[torch.from_numpy(image_n), torch.from_numpy(patch_n)]
    table = pa.table(
        {
            "prototype": wanted_p[which_n].astype(np.int32),
            "distance": _measured(vectors_nd, prototypes_pDhw, which_n, kind),
            "image_id": image_ids_B[image_n],
            "label": labels_B[image_n].astype(np.int32),
            "row": (patch_n // columns).astype(np.int32),
            "column": (patch_n % columns).astype(np.int32),
            "vector": vector_column(vectors_nd),
        },
        schema=CANDIDATE_SCHEMA,
    ).sort_by(_ORDER)
    return merge_nearest([_first_of_each_image(table) if one_per_image else table], k, spare)


def merge_nearest(tables: list[pa.Table], k: int, spare: int = 0) -> pa.Table:
    """The k best candidates of each prototype from several tables, sorted by prototype and rank; with `spare` up to
    that many more that rounding can't tell from the k-th."""
    table = pa.concat_tables(tables).sort_by(_ORDER)
    rank = rank_within_prototype(table)
    kept = rank < k
    beyond = np.flatnonzero((rank >= k) & (rank < k + spare))
    distance = table["distance"].to_numpy()
    kth = distance[beyond - rank[beyond] + k - 1]
    kept[beyond] = distance[beyond] <= kth + rounding(kth)
    return table.filter(pa.array(kept))


def rank_within_prototype(table: pa.Table) -> np.ndarray:
    """0, 1, 2 … for the rows of each prototype; the table must be sorted by prototype."""
    prototype = table["prototype"].to_numpy()
    first = np.searchsorted(prototype, prototype, side="left")
    return np.arange(len(prototype)) - first


def vector_column(vectors_nd: torch.Tensor) -> pa.ListArray:
    """Patches as the column `vector`."""
    vectors = np.ascontiguousarray(vectors_nd.float().cpu().numpy())
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pa.ListArray.from_arrays(offsets, vectors.reshape(-1))


def _prototypes_in_play(prototype_class_P: np.ndarray | None, labels_B: np.ndarray, count: int) -> np.ndarray:
    if prototype_class_P is None:
        return np.arange(count)
    return np.flatnonzero(np.isin(prototype_class_P, labels_B))


def _within_reach(
    distance_pBL: np.ndarray, k: int, spare: int, one_per_image: bool, slack: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prototype, image and patch indices of what may be among the k nearest, given that distances are off by up to
    `slack`; never more than `_MOST` beyond k and spare for each prototype (an image of one colour is all ties)."""
    best_pn = distance_pBL.min(axis=2) if one_per_image else distance_pBL.reshape(len(distance_pBL), -1)
    k = min(k, best_pn.shape[1])
    limit_p = np.partition(best_pn, k - 1, axis=1)[:, k - 1].astype(np.float64)
    # With fewer than k own patches in the batch all of them are candidates.
    limit_p = np.where(np.isfinite(limit_p), limit_p, np.finfo(np.float64).max)
    limit_p = limit_p + slack + (rounding(limit_p) if spare else 0)
    near_pBL = distance_pBL <= limit_p[:, None, None]
    if one_per_image:
        near_pBL &= distance_pBL <= (best_pn + slack)[:, :, None]
    indices = np.nonzero(near_pBL)
    order = np.lexsort((distance_pBL[indices], indices[0]))
    rank = np.arange(len(order)) - np.searchsorted(indices[0], indices[0])
    chosen = order[rank < k + spare + _MOST]
    return indices[0][chosen], indices[1][chosen], indices[2][chosen]


def _first_of_each_image(table: pa.Table) -> pa.Table:
    """Of a sorted table, the best row of each prototype and image."""
    pairs = np.column_stack([table["prototype"].to_numpy(), table["image_id"].to_numpy()])
    return table.take(np.sort(np.unique(pairs, axis=0, return_index=True)[1]))


def _measured(vectors_nd: torch.Tensor, prototypes_pDhw: torch.Tensor, which_n: np.ndarray, kind: Kind) -> np.ndarray:
    """Distance of each patch to its prototype, from differences in float64."""
    prototypes_pd, chunk = prototypes_pDhw.flatten(1), max(1, _NUMBERS // vectors_nd.shape[1])
    pairs = zip(vectors_nd.split(chunk), torch.from_numpy(which_n).split(chunk), strict=True)
    parts = [paired_distances(vectors_cd, prototypes_pd[which_c], kind) for vectors_cd, which_c in pairs]
    return torch.cat(parts).cpu().numpy()


def _rounding_of_maps(latent_BDHW: torch.Tensor, prototypes_PDhw: torch.Tensor) -> float:
    """By how much `distance_maps` may be off: float32 sums of squared norms."""
    cells = prototypes_PDhw.shape[2] * prototypes_PDhw.shape[3]
    norms = cells * latent_BDHW.square().sum(1).max() + prototypes_PDhw.square().flatten(1).sum(1).max()
    return _FLOAT32 * max(1.0, float(norms))
