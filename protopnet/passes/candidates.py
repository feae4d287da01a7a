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
Where only the best patch of an image counts, its second best is kept too if rounding can't tell the two apart.

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
_MOST = 32  # candidates measured beyond those asked for; with one an image, patches of an image measured
_LEAST_MERGED = 10_000  # rows that wait for a merge, however few are kept
_NUMBERS = 1 << 22  # measured in float64 at a time
_DISTANCES = 1 << 20  # of a batch looked through at a time


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
    barred_BL: np.ndarray | None = None,
    vectors: bool = True,
) -> pa.Table:
    """The k nearest patches of each prototype among the images of one batch.

    With `prototype_class_P` a prototype sees only images of its own class, and prototypes of classes that are
    not in the batch emit nothing. With `one_per_image` only the best patch of each image counts. Patches that are true
    in `barred_BL` are passed over. Returns sorted CANDIDATE_SCHEMA rows, at most k a prototype (and up to `spare` more,
    see above), with the patch itself (D*h*w floats) as `vector`, or null without `vectors`.
    """
    wanted_p = _prototypes_in_play(prototype_class_P, labels_B, len(prototypes_PDhw))
    B, _, H, W = latent_BDHW.shape
    chunk = max(1, _DISTANCES // (B * H * W))
    tables = [CANDIDATE_SCHEMA.empty_table()]
    for wanted_c in np.split(wanted_p, range(chunk, len(wanted_p), chunk)):
        if len(wanted_c):
            seen_cBL = None if barred_BL is None else ~barred_BL[None]
            if prototype_class_P is not None:
                own_cB1 = (prototype_class_P[wanted_c][:, None] == labels_B)[:, :, None]
                seen_cBL = own_cB1 if seen_cBL is None else own_cB1 & seen_cBL
            prototypes_cDhw = prototypes_PDhw[torch.from_numpy(wanted_c)]
            found = _nearest(
                latent_BDHW, image_ids_B, labels_B, prototypes_cDhw, kind, k, seen_cBL, one_per_image, spare
            )
            prototype = pa.array(wanted_c[found["prototype"].to_numpy()].astype(np.int32))
            tables.append(found.set_column(0, "prototype", prototype))
    table = pa.concat_tables(tables).combine_chunks()
    return table if vectors else without_vectors(table)


def without_vectors(table: pa.Table) -> pa.Table:
    """The same candidates, which then take 40 bytes each."""
    at = table.schema.get_field_index("vector")
    return table.set_column(at, table.schema.field(at), pa.nulls(len(table), table.schema.field(at).type))


def _nearest(
    latent_BDHW: torch.Tensor,
    image_ids_B: np.ndarray,
    labels_B: np.ndarray,
    prototypes_PDhw: torch.Tensor,
    kind: Kind,
    k: int,
    seen_PBL: np.ndarray | None,
    one_per_image: bool,
    spare: int,
) -> pa.Table:
    """`local_nearest` for few prototypes, numbered from 0. `seen_PBL`: the patches that each may see, of
    any shape that broadcasts to this."""
    _, _, h, w = prototypes_PDhw.shape
    columns = latent_BDHW.shape[3] - w + 1
    distance_PBL = distance_maps(latent_BDHW, prototypes_PDhw, kind).flatten(2).transpose(0, 1).cpu().numpy()
    if seen_PBL is not None:
        distance_PBL = np.where(seen_PBL, distance_PBL, np.inf)
    slack = _rounding_of_maps(latent_BDHW, prototypes_PDhw)
    within_reach = _images_within_reach if one_per_image else _patches_within_reach
    which_n, image_n, patch_n = within_reach(distance_PBL, k, spare, slack)
    vectors_nd = patches(latent_BDHW, h, w)[torch.from_numpy(image_n), torch.from_numpy(patch_n)]
    table = pa.table(
        {
            "prototype": which_n.astype(np.int32),
            "distance": _measured(vectors_nd, prototypes_PDhw, which_n, kind),
            "image_id": image_ids_B[image_n],
            "label": labels_B[image_n].astype(np.int32),
            "row": (patch_n // columns).astype(np.int32),
            "column": (patch_n % columns).astype(np.int32),
            "vector": vector_column(vectors_nd),
        },
        schema=CANDIDATE_SCHEMA,
    ).sort_by(_ORDER)
    if one_per_image:
        table = _best_of_each_image(table, with_equals=spare > 0)
    return merge_nearest([table], k, spare, one_per_image=one_per_image)


def merge_nearest(tables: list[pa.Table], k: int, spare: int = 0, *, one_per_image: bool = False) -> pa.Table:
    """The k best candidates of each prototype from several tables, sorted by prototype and rank; with `spare` up to
    that many more that rounding can't tell from the k-th. With `one_per_image` it is images that are counted."""
    table = pa.concat_tables(tables).sort_by(_ORDER)
    rank = rank_of_image(table) if one_per_image else rank_within_prototype(table)
    kept = rank < k
    prototype, distance = table["prototype"].to_numpy(), table["distance"].to_numpy()
    kth = np.flatnonzero(rank == k - 1)
    kth = kth[np.unique(prototype[kth], return_index=True)[1]]
    beyond = np.flatnonzero((rank >= k) & (rank < k + spare))
    limit = distance[kth[np.searchsorted(prototype[kth], prototype[beyond])]]
    kept[beyond] = distance[beyond] <= limit + rounding(limit)
    return table.filter(pa.array(kept))


class Cutoff:
    """Drops candidates that can't be among the k nearest, because of nearer ones that have passed already.

    Whoever looks through images in no order of classes meets each class again and again: without it every batch would send
    k candidates of every prototype of its classes. What is dropped has k others nearer by more than rounding, so what the
    reduce comes to stays the same, whichever images go to whom.
    """

    def __init__(self, prototypes: int, k: int) -> None:
        self.nearest_Pk = np.full((prototypes, k), np.inf)

    def passing(self, table: pa.Table, *, one_per_image: bool = False) -> pa.Table:
        """The rows of a sorted table that may matter; with `one_per_image` the k nearest are images."""
        best = first_of_each_image(table) if one_per_image else table
        rank, k = rank_within_prototype(best), self.nearest_Pk.shape[1]
        prototype_n, distance_n = best["prototype"].to_numpy()[rank < k], best["distance"].to_numpy()[rank < k]
        seen_p, place_n = np.unique(prototype_n, return_inverse=True)
        new_pk = np.full((len(seen_p), k), np.inf)
        new_pk[place_n, rank[rank < k]] = distance_n
        self.nearest_Pk[seen_p] = np.partition(np.hstack([self.nearest_Pk[seen_p], new_pk]), k - 1)[:, :k]
        limit_n = self.nearest_Pk[table["prototype"].to_numpy()].max(1)
        return table.filter(pa.array(table["distance"].to_numpy() <= limit_n + rounding(limit_n)))


class Reducer:
    """`merge_nearest` over any number of tables, one after another.

    Tables wait until together they are as long as what is kept, so that the merges cost as much as a few sorts of the
    result however many tables there are: with 100,000 prototypes, a merge for each table would take an hour.
    """

    def __init__(self, k: int, spare: int = 0, *, one_per_image: bool = False, least: int = _LEAST_MERGED) -> None:
        self.k, self.spare, self.one_per_image, self.least = k, spare, one_per_image, least
        self.kept, self.waiting = CANDIDATE_SCHEMA.empty_table(), list[pa.Table]()

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        if sum(map(len, self.waiting)) > max(len(self.kept), self.least):
            self.result()

    def result(self) -> pa.Table:
        """The candidates of all tables so far."""
        if self.waiting:
            tables = [self.kept, *self.waiting]
            self.kept = merge_nearest(tables, self.k, self.spare, one_per_image=self.one_per_image)
            self.waiting = []
        return self.kept


def rank_within_prototype(table: pa.Table) -> np.ndarray:
    """0, 1, 2 … for the rows of each prototype; the table must be sorted by prototype."""
    prototype = table["prototype"].to_numpy()
    return _places_in_runs(prototype)


def rank_of_image(table: pa.Table) -> np.ndarray:
    """0, 1, 2 … for the images of each prototype by their best patch, the same for all rows of an image; the table
    must be sorted by prototype and distance."""
    prototype = table["prototype"].to_numpy()
    first, pair_of_row = _pairs(table)
    begins = np.zeros(len(prototype), dtype=np.int64)
    begins[first] = 1
    images = np.cumsum(begins)
    return images[first[pair_of_row]] - images[np.searchsorted(prototype, prototype)]


def first_of_each_image(table: pa.Table) -> pa.Table:
    """Of a sorted table, the best row of each prototype and image."""
    return table.take(np.sort(_pairs(table)[0]))


def vector_column(vectors_nd: torch.Tensor) -> pa.ListArray:
    """Patches as the column `vector`."""
    vectors = np.ascontiguousarray(vectors_nd.float().cpu().numpy())
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pa.ListArray.from_arrays(offsets, vectors.reshape(-1))


def _prototypes_in_play(prototype_class_P: np.ndarray | None, labels_B: np.ndarray, count: int) -> np.ndarray:
    if prototype_class_P is None:
        return np.arange(count)
    return np.flatnonzero(np.isin(prototype_class_P, labels_B))


Reach = tuple[np.ndarray, np.ndarray, np.ndarray]  # prototype, image and patch indices


def _patches_within_reach(distance_pBL: np.ndarray, k: int, spare: int, slack: float) -> Reach:
    """What may be among the k nearest patches, given that distances are off by up to `slack`; never more than
    `_MOST` beyond k and spare for each prototype (an image of one colour is all ties)."""
    distance_pN = distance_pBL.reshape(len(distance_pBL), -1)
    limit_p = _limits(distance_pN, k, spare, slack)
    indices = np.nonzero(distance_pBL <= limit_p[:, None, None])
    order = np.lexsort((distance_pBL[indices], indices[0]))
    chosen = order[_places_in_runs(indices[0][order]) < k + spare + _MOST]
    return indices[0][chosen], indices[1][chosen], indices[2][chosen]


def _images_within_reach(distance_pBL: np.ndarray, k: int, spare: int, slack: float) -> Reach:
    """The same for the best patch of each image: patches that may be it, at most `_MOST` an image, of images that
    may be among the k nearest."""
    best_pB = distance_pBL.min(axis=2)
    near_pB = best_pB <= _limits(best_pB, k, spare, slack)[:, None]
    which, image = np.nonzero(near_pB)
    order = np.lexsort((best_pB[which, image], which))
    pair = order[_places_in_runs(which[order]) < k + spare + _MOST]
    which, image = which[pair], image[pair]
    best_n = best_pB[which, image].astype(np.float64)
    rounded = rounding(best_n) if spare else 0
    distance_nL = distance_pBL[which, image]
    n, patch = np.nonzero(distance_nL <= (best_n + slack + rounded)[:, None])
    order = np.lexsort((distance_nL[n, patch], n))
    chosen = order[_places_in_runs(n[order]) < _MOST]
    return which[n[chosen]], image[n[chosen]], patch[chosen]


def _limits(distance_pN: np.ndarray, k: int, spare: int, slack: float) -> np.ndarray:
    """Distance up to which something may be among the k nearest of each row."""
    k = min(k, distance_pN.shape[1])
    limit_p = np.partition(distance_pN, k - 1, axis=1)[:, k - 1].astype(np.float64)
    # With fewer than k own patches in the batch all of them are candidates.
    limit_p = np.where(np.isfinite(limit_p), limit_p, np.finfo(np.float64).max)
    return limit_p + slack + (rounding(limit_p) if spare else 0)


def _places_in_runs(sorted_n: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each run of equal numbers."""
    return np.arange(len(sorted_n)) - np.searchsorted(sorted_n, sorted_n)


def _best_of_each_image(table: pa.Table, *, with_equals: bool) -> pa.Table:
    """Of a sorted table, the best row of each prototype and image, and the second if rounding can't tell them apart."""
    if not with_equals:
        return first_of_each_image(table)
    first, pair_of_row = _pairs(table)
    order = np.argsort(pair_of_row, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = _places_in_runs(pair_of_row[order])
    distance = table["distance"].to_numpy()
    best = distance[first[pair_of_row]]
    return table.filter(pa.array((place == 0) | ((place == 1) & (distance <= best + rounding(best)))))


def _pairs(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """First row of each pair of a prototype and an image, and which pair each row is of."""
    image = table["image_id"].to_numpy()
    key = table["prototype"].to_numpy().astype(np.int64) * (image.max(initial=0) + 1) + image
    _, first, pair_of_row = np.unique(key, return_index=True, return_inverse=True)
    return first, pair_of_row


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
