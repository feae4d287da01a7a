"""How far explanations can be trusted: the metrics, from what was observed of each image.

Pure arithmetic. A pass (`quality/quality_pass.py`) reduces each image to an `Observation`; here observations are added
up, as whole numbers a prototype, so that neither their order nor how the images were cut into batches matters. Where
no image has key points, the metrics that need them are None. What each metric is, and whose: docs/data-formats.md.

Prototypes count by their class, however many a class has: also none, after pruning.

Legend: P prototypes, S names of parts, N places.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from protopnet.quality.key_points import BOX, PATCH, PartPoint, covered, parts_near, visible, without_sides
from protopnet.quality.perturbations import area_under

DEFINITIONS = 2  # raised when a number would mean something else than before
CONSISTENT = 0.8  # share of images in which a consistent prototype is on the same part
NEAREST = 10  # images a prototype for its purity
EVIDENCE = 5  # prototypes an image with the most points for the predicted class
_DECIMALS = 8  # prototypes that agree to so many are the same

Metrics = dict[str, Any]

PROTOTYPE_QUALITY_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),
        ("class", pa.int32()),
        ("images", pa.int32()),  # of its class, with key points
        ("part", pa.string()),  # its box is most often on this part
        ("part_share", pa.float64()),
        ("stability", pa.float64()),
        ("nearest_part", pa.string()),  # the same of its 10 most similar images
        ("purity", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Drawn:
    """What a generated picture tells of the evidence: it is known for each pixel what was drawn there.

    under: part below the middle of each evidence's place, in order; "" where there is no bird. bird: share of the
    image that is bird. chance and chance_box: share of the bird's pixels that are on a part that distinguishes the true
    class, and that have the key point of one within a box.
    """

    under: Sequence[str]
    bird: float
    chance: float
    chance_box: float


@dataclass(frozen=True)
class Observation:
    """What the metrics need of one image with key points. Places: (y, x) in fractions of the image, NaN nowhere.

    own: the prototypes of the image's true class, where they see themselves, and where once there is noise; contrast: how
    far the similarity there is above the mean of the map.
    evidence: those with the most points (more than 0) for the predicted class, most first, and where. nearest: the
    prototypes for which this may be among the most similar images, how similar, and the middle of the patch.
    """

    image_id: int
    label: int
    prediction: int
    points: Sequence[PartPoint]
    own: Sequence[int]
    own_places: np.ndarray
    own_places_noisy: np.ndarray
    own_contrast: Sequence[float]
    evidence_places: np.ndarray
    nearest: Sequence[int]
    nearest_similarity: Sequence[float]
    nearest_places: np.ndarray
    drawn: Drawn | None = None


@dataclass(frozen=True)
class PartQuality:
    """Metrics that need key points, and the same for each prototype (a column each, a row a prototype)."""

    metrics: Metrics
    prototypes: dict[str, list[Any]]


def part_quality(
    observations: Iterable[Observation],
    prototypes: int,
    distinguishing_K: Sequence[set[str]] | None = None,
) -> PartQuality:
    """All metrics that need key points. distinguishing_K: for each class the parts that tell it from others, if known."""
    seen = sorted((o for o in observations if o.points), key=lambda o: o.image_id)
    names = sorted({point.part for o in seen for point in o.points})
    hits_PS, visible_PS = np.zeros((2, prototypes, len(names)), dtype=np.int64)
    images_P, same_P = np.zeros((2, prototypes), dtype=np.int64)
    contrast_P = np.zeros(prototypes)
    for o in seen:
        own, near_NS = list(o.own), parts_near(o.own_places, o.points, names, BOX)
        hits_PS[own] += near_NS
        visible_PS[own] += visible(o.points, names)
        images_P[own] += 1
        contrast_P[own] += o.own_contrast
        same_P[own] += (near_NS == parts_near(o.own_places_noisy, o.points, names, BOX)).all(1)
    part_P, ratio_P = _most_often(hits_PS, visible_PS, images_P)
    stability_P = _ratio(same_P, images_P)
    pure_names = sorted({point.part for o in seen for point in without_sides(o.points)})
    pure_part_P, purity_P = purity(seen, prototypes, pure_names)
    metrics: Metrics = {
        "consistency": _over_prototypes(np.where(np.isnan(ratio_P), np.nan, ratio_P >= CONSISTENT)),
        "stability": _over_prototypes(stability_P),
        "purity": _purity_summary(purity_P),
        "contrast": _over_prototypes(_ratio(contrast_P, images_P)),
        "distinctiveness": place_quality(list(map(_apart, seen))),
        "pointing": pointing(seen),
        **(_truth(seen, distinguishing_K) if distinguishing_K is not None else {}),
    }
    columns = {
        "images": images_P.tolist(),
        "part": _named(part_P, names),
        "part_share": _listed(ratio_P),
        "stability": _listed(stability_P),
        "nearest_part": _named(pure_part_P, pure_names),
        "purity": _listed(purity_P),
    }
    return PartQuality(metrics, columns)


def purity(seen: Sequence[Observation], prototypes: int, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """For each prototype the part its 10 most similar images have most often in the patch, left and right made one,
    and the share of them (of those in which the part is visible): index (-1: none) and NaN without any image."""
    if not seen:
        return np.full(prototypes, -1), np.full(prototypes, np.nan)
    prototype_N = np.concatenate([np.asarray(o.nearest, dtype=np.int64) for o in seen])
    similarity_N = np.concatenate([np.asarray(o.nearest_similarity, dtype=np.float64) for o in seen])
    image_N = np.repeat(np.arange(len(seen)), [len(o.nearest) for o in seen])
    places_N2 = np.concatenate([o.nearest_places.reshape(-1, 2) for o in seen])
    order = np.lexsort((image_N, -similarity_N, prototype_N))
    ordered_N = prototype_N[order]
    rank_N = np.arange(len(ordered_N)) - np.searchsorted(ordered_N, ordered_N)
    hits_PS, visible_PS = np.zeros((2, prototypes, len(names)), dtype=np.int64)
    images_P = np.zeros(prototypes, dtype=np.int64)
    for kept in order[rank_N < NEAREST]:
        points, prototype = without_sides(seen[image_N[kept]].points), prototype_N[kept]
        hits_PS[prototype] += parts_near(places_N2[kept : kept + 1], points, names, PATCH)[0]
        visible_PS[prototype] += visible(points, names)
        images_P[prototype] += 1
    return _most_often(hits_PS, visible_PS, images_P)


def pointing(seen: Iterable[Observation]) -> Metrics | None:
    """Share of the evidence's places with a key point within a patch, and how often places at random would have one."""
    places = hits = images = 0
    chance = 0.0
    for o in seen:
        near_NS = parts_near(o.evidence_places, o.points, sorted({point.part for point in o.points}), PATCH)
        hits += int(near_NS.any(1).sum())
        places += len(near_NS)
        chance += len(near_NS) * covered(o.points, PATCH)
        images += 1
    if not places:
        return None
    return {"value": hits / places, "chance": chance / places, "places": places, "images": images}


def on_object(on_N: Sequence[Sequence[bool] | None], share_N: Sequence[float | None]) -> Metrics | None:
    """Share of the evidence's places that are on the object, and how much of the images it is, of images that know it."""
    known = [(on, share) for on, share in zip(on_N, share_N, strict=True) if on and share is not None]
    found = _share([hit for on, _ in known for hit in on], [share for on, share in known for _ in on])
    return found and found | {"images": len(known)}


def sparsity(prototypes_PDhw: np.ndarray, classes: int, map_cells: int) -> Metrics:
    """1 where there is one distinct prototype a class, 1/10 where there are 10. map_cells: of the latent map."""
    P, D = prototypes_PDhw.shape[:2]
    rounded = np.round(prototypes_PDhw.astype(np.float64), _DECIMALS)
    distinct = len(np.unique(rounded.reshape(P, -1), axis=0))
    cells = len(np.unique(np.moveaxis(rounded, 1, -1).reshape(-1, D), axis=0))
    value = classes * (1 + 1 / map_cells) / (distinct + cells / map_cells)
    return {"value": value, "prototypes": P, "distinct": distinct}


def curve_quality(curves: Sequence[Sequence[float]]) -> Metrics | None:
    """Mean of the images' curves and of the areas under them; None without images."""
    if not curves:
        return None
    mean = np.mean(np.asarray(curves, dtype=np.float64), axis=0)
    return {"value": area_under(mean.tolist()), "images": len(curves), "curve": mean.round(6).tolist()}


def place_quality(images: Sequence[Sequence[float]]) -> Metrics | None:
    """Mean over all places (or pairs of them) of some images; None where there are none."""
    values = [value for image in images for value in image]
    if not values:
        return None
    return {"value": float(np.mean(values)), "places": len(values), "images": sum(bool(image) for image in images)}


def _apart(o: Observation) -> list[float]:
    """Of each two own prototypes with a place, whether they are more than a patch apart along an axis."""
    places_N2 = o.own_places[~np.isnan(o.own_places).any(1)]
    first, second = np.triu_indices(len(places_N2), k=1)
    return (np.abs(places_N2[first] - places_N2[second]) > PATCH).any(1).astype(float).tolist()


def drawn(
    under: Sequence[str],
    parts_YX: np.ndarray,
    names: Mapping[int, str],
    points: Sequence[PartPoint],
    distinguishing: set[str],
) -> Drawn:
    """Of a generated picture's map of parts (values: 0 for no bird, else keys of `names`) what the truth needs."""
    is_bird_YX = parts_YX > 0
    telling = [value for value, name in names.items() if name in distinguishing]
    rows, columns = np.nonzero(is_bird_YX)
    if not len(rows):
        return Drawn(under, 0.0, 0.0, 0.0)
    places_N2 = (np.stack([rows, columns], axis=1) + 0.5) / parts_YX.shape
    chosen = [point for point in points if point.part in distinguishing]
    near_N = parts_near(places_N2, chosen, sorted(distinguishing), BOX).any(1)
    on_part_N = np.isin(parts_YX[rows, columns], telling)
    return Drawn(under, float(is_bird_YX.mean()), float(on_part_N.mean()), float(near_N.mean()))


def _truth(seen: Sequence[Observation], distinguishing_K: Sequence[set[str]]) -> Metrics:
    """On generated birds: is the best evidence of a correct prediction on a part that distinguishes the class?"""
    known = [(o, o.drawn) for o in seen if o.drawn is not None]
    correct = [(o, picture) for o, picture in known if o.prediction == o.label]
    boxed = [_top_near(o, distinguishing_K[o.label]) for o, _ in correct]
    exact = [any(part in distinguishing_K[o.label] for part in picture.under[:1]) for o, picture in correct]
    on_bird = [part != "" for _, picture in known for part in picture.under]
    truth = _share(boxed, [picture.chance_box for _, picture in correct])
    if truth is not None:
        truth["per_class"] = _means([o.label for o, _ in correct], boxed, len(distinguishing_K))
    return {
        "truth": truth,
        "truth_exact": _share(exact, [picture.chance for _, picture in correct]),
        "on_bird": _share(on_bird, [picture.bird for _, picture in known for _ in picture.under]),
    }


def _top_near(o: Observation, parts: set[str]) -> bool:
    points = [point for point in o.points if point.part in parts]
    return bool(parts_near(o.evidence_places[:1], points, sorted(parts), BOX).any())


def _share(hits: Sequence[bool], chances: Sequence[float]) -> Metrics | None:
    if not hits:
        return None
    return {"value": float(np.mean(hits)), "chance": float(np.mean(chances)), "places": len(hits)}


def _means(labels: Sequence[int], hits: Sequence[bool], classes: int) -> list[float | None]:
    counts_K = np.bincount(labels, minlength=classes)
    return _listed(_ratio(np.bincount(labels, weights=hits, minlength=classes), counts_K))


def _most_often(hits_PS: np.ndarray, visible_PS: np.ndarray, images_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part each prototype is most often on, of the images where it is visible, and how often."""
    if not hits_PS.shape[1]:
        return np.full(len(images_P), -1), np.full(len(images_P), np.nan)
    ratio_PS = hits_PS / np.maximum(visible_PS, 1)
    best_P, ratio_P = ratio_PS.argmax(1), ratio_PS.max(1)
    return np.where(ratio_P > 0, best_P, -1), np.where(images_P > 0, ratio_P, np.nan)


def _ratio(counts_P: np.ndarray, of_P: np.ndarray) -> np.ndarray:
    return np.where(of_P > 0, counts_P / np.maximum(of_P, 1), np.nan)


def _over_prototypes(values_P: np.ndarray) -> Metrics | None:
    known = values_P[~np.isnan(values_P)]
    return {"value": float(known.mean()), "prototypes": len(known)} if len(known) else None


def _purity_summary(purity_P: np.ndarray) -> Metrics | None:
    known = purity_P[~np.isnan(purity_P)]
    if not len(known):
        return None
    spread = {"deviation": float(known.std()), "above_half": int((known > 0.5).sum())}
    return {"value": float(known.mean()), **spread, "prototypes": len(known)}


def _named(index_P: np.ndarray, names: Sequence[str]) -> list[str | None]:
    return [names[index] if index >= 0 else None for index in index_P]


def _listed(values_P: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values_P]
