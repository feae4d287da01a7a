"""The nearest patches of an audit as one table, and how much of each lies on what the image shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet.datasets.masks import on_mask
from protopnet.model.boxes import PERCENTILE, upsample
from protopnet.passes.candidates import rank_within_prototype
from protopnet.quality.key_points import PATCH

_BOX = pa.list_(pa.int32(), 4)
NEAREST_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),
        ("split", pa.string()),  # train or validation
        ("rank", pa.int32()),  # 1 is the nearest
        ("distance", pa.float64()),
        ("similarity", pa.float32()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("class", pa.int32()),  # of the image
        ("class_name", pa.string()),
        ("own_class", pa.bool_()),  # the image is of the prototype's class
        ("is_source", pa.bool_()),  # the prototype comes from this image
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("row", pa.int32()),
        ("column", pa.int32()),
        ("box", _BOX),
        ("on_object", pa.float64()),  # share of what is most active that lies on the object; null where nothing tells
        ("activation_map", pa.list_(pa.list_(pa.float32()))),
    ]
)
_GRID = 48  # pixels a side to which maps are enlarged, to see where they are most active
_CHUNK = 1024


def nearest_table(
    candidates: Mapping[str, pa.Table],
    described: pa.Table,
    rows: pa.Table,
    prototypes: pa.Table,
    classes: Sequence[str],
) -> pa.Table:
    """NEAREST_SCHEMA rows, by prototype, split and rank.

    candidates: of `nearest_patches`, by split. described: of `describe_patches`. rows: the manifest. prototypes: of the
    bundle.
    """
    found = pa.concat_tables([_ranked(table, split) for split, table in candidates.items()])
    seen = described.take(pa.array(_places_of(found, described)))
    source_of = pc.take(prototypes["sha256"], found["prototype"])
    names = pa.array(list(classes), pa.string())
    class_P = prototypes["class"].to_numpy()
    label = found["label"].to_numpy()
    columns: dict[str, Any] = {name: found[name] for name in ("prototype", "split", "rank", "distance", "image_id")}
    columns |= {name: seen[name] for name in ("uri", "width", "height", "row", "column", "box", "activation_map")}
    columns |= {
        "similarity": seen["self_similarity"],
        "class": found["label"],
        "class_name": names.take(pa.array(label)),
        "own_class": label == class_P[found["prototype"].to_numpy()],
        "is_source": pc.equal(seen["sha256"], source_of),
        "on_object": _on_object(seen, rows),
    }
    table = pa.table({name: columns[name] for name in NEAREST_SCHEMA.names}).cast(NEAREST_SCHEMA)
    order = [("prototype", "ascending"), ("split", "ascending"), ("rank", "ascending")]
    return table.sort_by(order).combine_chunks()


def most_active(maps_NHW: torch.Tensor) -> list[np.ndarray]:
    """For each activation map the places (x, y in fractions of the image) that are among its 5 % most active."""
    enlarged_NYX = upsample(maps_NHW, _GRID, _GRID).numpy()
    limits_N = np.percentile(enlarged_NYX.reshape(len(enlarged_NYX), -1), PERCENTILE, axis=1)
    return [
        np.argwhere(map_YX >= limit)[:, ::-1] / _GRID + 0.5 / _GRID
        for map_YX, limit in zip(enlarged_NYX, limits_N, strict=True)
    ]


def on_object(
    places_N2: np.ndarray, points: Sequence[Mapping[str, Any]] | None, grid: bytes | None = None
) -> np.ndarray | None:
    """Which places are on what the image shows: on its mask where it has one (`datasets/masks.py`), else within the
    outline (convex hull) of its key points or within `PATCH` of one, since parts reach beyond their key points. x, y in
    fractions of the image.

    None without a mask and with fewer than three points that aren't on one line: there is no outline.
    """
    if grid is not None:
        return on_mask(places_N2, grid)
    points_M2 = np.array([(point["x"], point["y"]) for point in points or []]).reshape(-1, 2)
    outline_N2 = _hull(points_M2)
    if len(outline_N2) < 3:
        return None
    x_N, y_N = places_N2.T
    inside_N = np.ones(len(places_N2), dtype=bool)
    for (x0, y0), (x1, y1) in zip(outline_N2, np.roll(outline_N2, -1, axis=0), strict=True):
        inside_N &= (x1 - x0) * (y_N - y0) - (y1 - y0) * (x_N - x0) >= 0
    near_N: np.ndarray = (np.abs(places_N2[:, None] - points_M2[None]) <= PATCH).all(2).any(1)
    return inside_N | near_N


def share_on_object(
    places_N2: np.ndarray, points: Sequence[Mapping[str, Any]] | None, grid: bytes | None = None
) -> float | None:
    """Share of places that are on the object; None where nothing tells."""
    on_N = on_object(places_N2, points, grid)
    return None if on_N is None else float(on_N.mean())


def _hull(points_N2: np.ndarray) -> np.ndarray:
    """Corners of the convex hull in order of growing angle (Andrew's monotone chain)."""
    points = [tuple(point) for point in np.unique(points_N2, axis=0).tolist()]

    def half(points: list[Any]) -> list[Any]:
        corners: list[Any] = []
        for x, y in points:
            while len(corners) > 1 and _turn(corners[-2], corners[-1], (x, y)) <= 0:
                corners.pop()
            corners.append((x, y))
        return corners[:-1]

    return np.array(half(points) + half(points[::-1])).reshape(-1, 2)


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _on_object(seen: pa.Table, rows: pa.Table) -> list[float | None]:
    at = pc.index_in(seen["image_id"], value_set=rows["image_id"].combine_chunks())
    points, grids = pc.take(rows["parts"], at), pc.take(rows["object"], at)
    if points.null_count == grids.null_count == len(points):
        return [None] * len(points)
    shares: list[float | None] = []
    for start in range(0, len(seen), _CHUNK):
        maps_NHW = torch.tensor(seen["activation_map"].slice(start, _CHUNK).to_pylist())
        known = (column.slice(start, _CHUNK).to_pylist() for column in (points, grids))
        shares += [share_on_object(*each) for each in zip(most_active(maps_NHW), *known, strict=True)]
    return shares


def _ranked(candidates: pa.Table, split: str) -> pa.Table:
    rank = pa.array(rank_within_prototype(candidates) + 1, pa.int32())
    kept = candidates.select(["prototype", "distance", "image_id", "label"])
    return kept.append_column("rank", rank).append_column("split", pa.array([split] * len(kept)))


def _places_of(found: pa.Table, described: pa.Table) -> np.ndarray:
    """Row of `described`, which is sorted by prototype and image, for each row of `found`."""
    images = int(described["image_id"].to_numpy().max(initial=0)) + 1
    keys = [t["prototype"].to_numpy().astype(np.int64) * images + t["image_id"].to_numpy() for t in (described, found)]
    return np.searchsorted(*keys)
