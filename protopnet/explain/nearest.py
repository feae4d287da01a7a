"""Nearest latent patches of each prototype: the map and the reduce, without Ray.

One primitive serves the push (nearest patches of the prototype's own class), pruning and the audit (nearest
patches of any class, one an image). The map turns a batch of latent maps into a table of candidates; the
reduce keeps the best of any number of such tables. The order is lexicographic in (distance, image, row,
column), so the reduce is associative and commutative and its result doesn't depend on how the images were cut
into batches, shards or workers.

Legend: B images, P prototypes, D channels, H W cells, L = H*W patches.
"""

import numpy as np
import pyarrow as pa
import torch

from protopnet.model.prototypes import Kind, distance_maps, patches

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
) -> pa.Table:
    """The k nearest patches of each prototype among the images of one batch.

    With `prototype_class_P` a prototype sees only images of its own class, and prototypes of classes that are
    not in the batch emit nothing. Returns CANDIDATE_SCHEMA rows, at most k a prototype, with the patch itself
    (D*h*w floats) as `vector`.
    """
    order = np.argsort(
        image_ids_B, kind="stable"
    )  # then a stable sort by distance breaks ties as the reduce does
    latent_BDHW, image_ids_B, labels_B = (
        latent_BDHW[torch.from_numpy(order)],
        image_ids_B[order],
        labels_B[order],
    )
    wanted_p = _prototypes_in_play(prototype_class_P, labels_B, len(prototypes_PDhw))
    if not len(wanted_p):
        return CANDIDATE_SCHEMA.empty_table()

    _, _, h, w = prototypes_PDhw.shape
    columns = latent_BDHW.shape[3] - w + 1
    distance_BpHW = distance_maps(latent_BDHW, prototypes_PDhw[torch.from_numpy(wanted_p)], kind)
    distance_pBL = distance_BpHW.flatten(2).transpose(0, 1).double().cpu().numpy()
    if prototype_class_P is not None:
        distance_pBL = np.where(
            (prototype_class_P[wanted_p][:, None] == labels_B)[:, :, None], distance_pBL, np.inf
        )
    chosen_p, image_p, patch_p = _smallest(distance_pBL, k, one_per_image)

    patches_BLd = patches(latent_BDHW, h, w).cpu().numpy()
    return pa.table(
        {
            "prototype": wanted_p[chosen_p].astype(np.int32),
            "distance": distance_pBL[chosen_p, image_p, patch_p],
            "image_id": image_ids_B[image_p],
            "label": labels_B[image_p].astype(np.int32),
            "row": (patch_p // columns).astype(np.int32),
            "column": (patch_p % columns).astype(np.int32),
            "vector": list(patches_BLd[image_p, patch_p]),
        },
        schema=CANDIDATE_SCHEMA,
    )


def merge_nearest(tables: list[pa.Table], k: int) -> pa.Table:
    """The k best candidates of each prototype from several tables, sorted by prototype and rank."""
    table = pa.concat_tables(tables).sort_by(_ORDER)
    return table.filter(pa.array(rank_within_prototype(table) < k))


def rank_within_prototype(table: pa.Table) -> np.ndarray:
    """0, 1, 2 … for the rows of each prototype; the table must be sorted by prototype."""
    prototype = table["prototype"].to_numpy()
    first = np.searchsorted(prototype, prototype, side="left")
    return np.arange(len(prototype)) - first


def _prototypes_in_play(prototype_class_P: np.ndarray | None, labels_B: np.ndarray, count: int) -> np.ndarray:
    if prototype_class_P is None:
        return np.arange(count)
    return np.flatnonzero(np.isin(prototype_class_P, labels_B))


def _smallest(
    distance_pBL: np.ndarray, k: int, one_per_image: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prototype, image and patch indices of the k smallest finite entries of each prototype, in order."""
    p, _, patch_count = distance_pBL.shape
    if one_per_image:
        best_patch_pB = distance_pBL.argmin(axis=2)  # the first minimum in row-major order
        best_pB = np.take_along_axis(distance_pBL, best_patch_pB[:, :, None], axis=2)[:, :, 0]
        image_pk = np.argsort(best_pB, axis=1, kind="stable")[:, :k]
        patch_pk = np.take_along_axis(best_patch_pB, image_pk, axis=1)
    else:
        flat_pk = np.argsort(distance_pBL.reshape(p, -1), axis=1, kind="stable")[:, :k]
        image_pk, patch_pk = np.divmod(flat_pk, patch_count)
    prototype_pk = np.broadcast_to(np.arange(p)[:, None], image_pk.shape)
    finite_pk = np.isfinite(distance_pBL[prototype_pk, image_pk, patch_pk])
    return prototype_pk[finite_pk], image_pk[finite_pk], patch_pk[finite_pk]
