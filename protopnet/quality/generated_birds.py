"""The truth about generated birds: each picture can be drawn again, and then it is known which part is where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from protopnet.config import BirdSettings
from protopnet.datasets.birds import PART_ID, Kind, bird_kinds, distinguishing_parts, redraw
from protopnet.quality.key_points import PartPoint, peaks
from protopnet.quality.metrics import Drawn, Metrics, drawn

_NAMES = {value: part for part, value in PART_ID.items()}


@dataclass(frozen=True)
class Birds:
    """How generated birds were drawn, and for each class of a bundle the parts that tell it from the others."""

    settings: BirdSettings
    kinds: list[Kind]
    distinguishing_K: list[set[str]]

    @classmethod
    def of(cls, source: Mapping[str, Any], classes: Sequence[str]) -> "Birds | None":
        """From what a dataset says of its source; None where its images aren't generated birds of these classes."""
        if source.get("kind") != "birds" or not BirdSettings.model_fields.keys() <= source.keys():
            return None
        settings = BirdSettings.model_validate({name: source[name] for name in BirdSettings.model_fields})
        kinds = bird_kinds(settings)
        kind_of = {kind.name: kind for kind in kinds}
        if not set(classes) <= set(kind_of):
            return None
        chosen = [kind_of[name] for name in classes]
        return cls(settings, kinds, [distinguishing_parts(chosen, label) for label in range(len(chosen))])

    def drawn(
        self, uri: str, sha256: str, label: int, points: Sequence[PartPoint], places_N2: np.ndarray
    ) -> Drawn | None:
        """The truth about places on a picture; None where it can't be drawn as it was (see `redraw`)."""
        picture = redraw(self.settings, self.kinds, uri, sha256)
        if picture is None:
            return None
        under = parts_under(places_N2, picture.part_map)
        return drawn(under, picture.part_map, _NAMES, points, self.distinguishing_K[label])


def prototypes_on_birds(prototypes: pa.Table, birds: Birds, size: int) -> Metrics:
    """How many prototypes (`PROTOTYPE_SCHEMA`) lie on the bird, and on a part that distinguishes their class, on the
    pictures they come from. size: of the network's input."""
    found: list[tuple[Drawn, set[str]]] = []
    for row in prototypes.select(["class", "uri", "sha256", "activation_map"]).to_pylist():
        places_N2 = peaks(torch.tensor(row["activation_map"])[None], size)
        picture = birds.drawn(row["uri"], row["sha256"], row["class"], [], places_N2)
        if picture is not None:
            found.append((picture, birds.distinguishing_K[row["class"]]))
    if not found:
        return {}
    on_bird = [picture.under[0] != "" for picture, _ in found]
    on_part = [picture.under[0] in telling for picture, telling in found]
    return {
        "prototypes_on_bird": _share(on_bird, [picture.bird for picture, _ in found]),
        "prototypes_on_truth": _share(on_part, [picture.chance for picture, _ in found]),
    }


def _share(hits: Sequence[bool], chances: Sequence[float]) -> Metrics:
    return {"value": float(np.mean(hits)), "chance": float(np.mean(chances)), "prototypes": len(hits)}


def parts_under(places_N2: np.ndarray, parts_YX: np.ndarray) -> list[str]:
    """The part below each place; "" where there is no bird, and for a place that is nowhere."""
    known = ~np.isnan(places_N2).any(1)
    pixel_N2 = np.zeros(places_N2.shape, dtype=np.int64)
    shape = np.asarray(parts_YX.shape)
    pixel_N2[known] = np.minimum(places_N2[known] * shape, shape - 1)
    values_N = np.where(known, parts_YX[pixel_N2[:, 0], pixel_N2[:, 1]], 0)
    return [_NAMES.get(value, "") for value in values_N.tolist()]
