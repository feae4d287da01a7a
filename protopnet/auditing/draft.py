"""Which prototypes a trained network can do without, and what it is without them. No images, no Ray.

The rules name prototypes by their place among those given; `with_prototypes` and `Draft` keep the class connections, so
that the logits of what remains are the old ones less the points of what went. The last layer is for the caller to
solve again.

Legend: P prototypes, K classes, D channels, h w of a prototype.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet, set_phase

Place = tuple[int, int, int]  # image_id, row and column of a patch


@dataclass(frozen=True)
class Verdict:
    """What the authors' rule says of each prototype. `own_P`: how many of its k nearest images are of its class;
    `spared`: prototypes that fall under the rule but are the best of a class that would lose all."""

    own_P: np.ndarray
    removed: list[int]
    spared: list[int]


def prune_by_neighbours(nearest: pa.Table, prototype_class_P: np.ndarray, threshold: int) -> Verdict:
    """The authors' rule: a prototype goes if fewer than `threshold` of its nearest patches are of its class.

    nearest: CANDIDATE_SCHEMA rows of the k nearest patches of each prototype over the training images of all classes,
    one an image. Unlike theirs the rule never empties a class: of one that would lose all its prototypes, that with
    the most neighbours of its class stays, then that with the smallest mean distance to them, then the first.
    """
    prototype, distance = nearest["prototype"].to_numpy(), nearest["distance"].to_numpy()
    P = len(prototype_class_P)
    is_own = nearest["label"].to_numpy() == prototype_class_P[prototype]
    own_P = np.bincount(prototype[is_own], minlength=P)
    total_P = np.bincount(prototype[is_own], weights=distance[is_own], minlength=P)
    mean_P = np.where(own_P > 0, total_P / np.maximum(own_P, 1), np.inf)
    doomed_P = own_P < threshold
    spared = []
    for label in np.unique(prototype_class_P):
        members = np.flatnonzero(prototype_class_P == label)
        if doomed_P[members].all():
            spared.append(int(members[np.lexsort((mean_P[members], -own_P[members]))[0]]))
    removed = sorted(set(np.flatnonzero(doomed_P).tolist()) - set(spared))
    return Verdict(own_P, removed, spared)


def check_removal(remove: Sequence[int], prototype_class_P: np.ndarray, classes: Sequence[str]) -> None:
    """`UserError` for numbers that no prototype has, and for a class that would be left without prototypes."""
    P = len(prototype_class_P)
    if unknown := [number for number in remove if not 0 <= number < P]:
        raise UserError(f"--remove names {_listed(unknown)}, but the bundle's prototypes are 0 to {P - 1}")
    left = np.delete(np.arange(P), np.unique(remove).astype(int))
    for label in np.setdiff1d(prototype_class_P, prototype_class_P[left]):
        members = np.flatnonzero(prototype_class_P == label).tolist()
        raise UserError(
            f"--remove would leave class {classes[label]!r} without prototypes: keep at least one of {_listed(members)}"
        )


@dataclass(frozen=True)
class Merge:
    """Prototypes that say the same: the first stays and takes over the connections of the others."""

    kept: int
    repeats: list[int]


def find_repeats(
    prototypes_PDhw: torch.Tensor, prototype_class_P: np.ndarray, places: Sequence[Place], tolerance: float
) -> list[Merge]:
    """Prototypes of one class on the same patch, or whose vectors are within `tolerance` (squared distance).

    Taken in order: each joins the first that stays and that it repeats, so that a chain of small steps doesn't
    swallow a class.
    """
    vectors_PQ = prototypes_PDhw.detach().double().flatten(1)
    repeats: dict[int, list[int]] = {}
    kept_of: dict[int, list[int]] = {}
    for p, label in enumerate(prototype_class_P.tolist()):
        kept = kept_of.setdefault(label, [])
        distances = (vectors_PQ[kept] - vectors_PQ[p]).square().sum(1).tolist()
        near = (q for q, d in zip(kept, distances, strict=True) if d <= tolerance or places[q] == places[p])
        first = next(near, None)
        if first is None:
            repeats[p] = []
            kept.append(p)
        else:
            repeats[first].append(p)
    return [Merge(kept, others) for kept, others in repeats.items() if others]


def merged_connections(connections_KP: torch.Tensor, merges: Sequence[Merge]) -> torch.Tensor:
    """The connections with those of repeats added to the prototype that stays (the repeats' own are then to go)."""
    merged_KP = connections_KP.clone()
    for merge in merges:
        merged_KP[:, merge.kept] += connections_KP[:, merge.repeats].sum(1)
    return merged_KP


def with_prototypes(
    network: ProtoPNet,
    model: ModelSettings,
    prototypes_PDhw: torch.Tensor,
    prototype_class_P: np.ndarray,
    connections_KP: torch.Tensor,
) -> ProtoPNet:
    """A network in eval mode with other prototypes and connections; backbone and add-on layers are shared with the
    given one, not copied."""
    other = ProtoPNet(network.backbone, model, len(connections_KP), torch.from_numpy(prototype_class_P.copy()))
    other.add_on = network.add_on
    with torch.no_grad():
        other.prototypes.copy_(prototypes_PDhw)
        other.last_layer.weight.copy_(connections_KP)
    set_phase(other, "eval")
    return other


@dataclass(frozen=True)
class Draft:
    """The prototypes of a bundle while they are being corrected.

    numbers_P: what each is called in the bundle it comes from; prototypes_PDhw, prototype_class_P and connections_KP
    as in the network; places: the patch that each is.
    """

    numbers_P: np.ndarray
    prototypes_PDhw: torch.Tensor
    prototype_class_P: np.ndarray
    connections_KP: torch.Tensor
    places: list[Place]

    @classmethod
    def of(cls, network: ProtoPNet, places: list[Place]) -> "Draft":
        classes_P = network.prototype_class.cpu().numpy()
        connections_KP = network.last_layer.weight.detach().clone()
        return cls(np.arange(len(classes_P)), network.prototypes.detach().clone(), classes_P, connections_KP, places)

    def __len__(self) -> int:
        return len(self.numbers_P)

    def network(self, like: ProtoPNet, model: ModelSettings) -> ProtoPNet:
        return with_prototypes(like, model, self.prototypes_PDhw, self.prototype_class_P, self.connections_KP)

    def only(self, kept: Sequence[int]) -> "Draft":
        """The prototypes at these places of the draft."""
        at = torch.tensor(kept, dtype=torch.int64)
        return Draft(
            self.numbers_P[kept],
            self.prototypes_PDhw[at],
            self.prototype_class_P[kept],
            self.connections_KP[:, at],
            [self.places[p] for p in kept],
        )

    def without(self, removed: Sequence[int]) -> "Draft":
        going = set(removed)
        return self.only([p for p in range(len(self)) if p not in going])

    def at(self, numbers: Iterable[int]) -> list[int]:
        """Where in the draft the prototypes with these numbers are; those that are gone are left out."""
        places = {number: p for p, number in enumerate(self.numbers_P.tolist())}
        return [places[number] for number in numbers if number in places]

    def moved(self, moving: Sequence[int], vectors_md: np.ndarray, places: pa.Table) -> "Draft":
        """The draft with the prototypes at these places on other patches. places: image_id, row and column."""
        prototypes_PDhw, onto = self.prototypes_PDhw.clone(), list(self.places)
        shape = prototypes_PDhw[:0].shape[1:]
        columns = (places[name].to_pylist() for name in ("image_id", "row", "column"))
        for p, vector_d, place in zip(moving, vectors_md, zip(*columns, strict=True), strict=True):
            prototypes_PDhw[p], onto[p] = torch.from_numpy(vector_d).view(shape), place
        return replace(self, prototypes_PDhw=prototypes_PDhw, places=onto)

    def labels(self, prototypes: Sequence[int]) -> list[int]:
        """The classes that these prototypes of the draft are of."""
        labels: list[int] = np.unique(self.prototype_class_P[list(prototypes)]).tolist()
        return labels

    def named(self, prototypes: Sequence[int]) -> list[int]:
        """The numbers that the bundle gives to these prototypes of the draft."""
        return [int(self.numbers_P[p]) for p in prototypes]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
