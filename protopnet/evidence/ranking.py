"""The arithmetic of evidence: which prototypes give a class its points, and where in the image they see themselves.

Works on what the members of an ensemble saw of a batch (`View`), so the forward passes may have run elsewhere. The
prototypes of all members are ranked together; `rank` costs little more than the forward pass it follows.

Legend: B images, M members, P prototypes of a member, S prototypes of all members one after another, K classes,
R pairs (image, class) to explain, N prototypes listed for each, U distinct pairs (image, prototype) among those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from protopnet.model.boxes import activation_boxes, scale_boxes
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import Kind, distance_maps_of_pairs, similarity, true_float32

Order = Literal["points", "similarity"]


class View(NamedTuple):
    """What one member sees of a batch: all that evidence needs of a forward pass."""

    logits_BK: Tensor
    similarities_BP: Tensor
    index_BP: Tensor  # the nearest patch of each prototype, row-major
    latent_BDHW: Tensor

    @property
    def best_B(self) -> Tensor:
        """Similarity of each image to the prototype it is most like."""
        return self.similarities_BP.amax(1)


@dataclass(frozen=True)
class Head:
    """A member's prototypes and class connections: all of it but the layers below."""

    prototypes_PDhw: Tensor
    weights_KP: Tensor
    prototype_class_P: np.ndarray
    kind: Kind
    epsilon: float

    @classmethod
    def of(cls, network: ProtoPNet) -> "Head":
        return cls(
            network.prototypes.detach(),
            network.last_layer.weight.detach(),
            network.prototype_class.cpu().numpy(),
            network.kind,
            network.epsilon,
        )

    def maps(self, latent_BDHW: Tensor, image_U: np.ndarray, prototype_U: np.ndarray) -> Tensor:
        """Similarity of a prototype to every patch of an image, for pairs of them: `maps_UHW`, float32."""
        prototypes_PDhw = self.prototypes_PDhw.to(latent_BDHW.device)
        distances_UHW = distance_maps_of_pairs(latent_BDHW, prototypes_PDhw, image_U, prototype_U, self.kind)
        return similarity(distances_UHW, self.kind, self.epsilon)


@dataclass(frozen=True)
class Ranking:
    """The N prototypes with the most points for each of R pairs (image, class), best first.

    `total_R` are the points of all prototypes, added up in float64: the class's logit. Boxes are (top, left, bottom,
    right) in pixels of the image as uploaded; rows and columns are those of the patch on the member's latent map.
    `pair_RN` leads to `maps`: the similarities of that prototype to every patch, H x W. `own_R` is the share of
    the points that the class's own prototypes bring. `rival_connection_RN`: to another class that was to be told apart.
    """

    image_R: np.ndarray
    class_R: np.ndarray
    total_R: np.ndarray
    own_R: np.ndarray
    member_RN: np.ndarray
    prototype_RN: np.ndarray
    similarity_RN: np.ndarray
    connection_RN: np.ndarray
    points_RN: np.ndarray
    row_RN: np.ndarray
    column_RN: np.ndarray
    box_RN4: np.ndarray
    pair_RN: np.ndarray
    maps: Sequence[np.ndarray]
    rival_connection_RN: np.ndarray | None = None


@torch.inference_mode()
def rank(
    views: Sequence[View],
    heads: Sequence[Head],
    image_R: np.ndarray,
    class_R: np.ndarray,
    sizes_B2: np.ndarray,
    *,
    listed: int,
    image_sizes: Sequence[int],
    by: Order = "points",
    rival_R: np.ndarray | None = None,
) -> Ranking:
    """Rank the prototypes of all members for pairs of an image and a class, by points or by similarity alone.

    sizes_B2: width and height of each image as uploaded. listed: N, or fewer if there aren't so many prototypes.
    image_sizes: side of each member's input. Similarity and connection multiply in float32, as in the last layer.
    rival_R: classes to tell apart from those: ranks by the points more than these get, and lists the `listed` highest
    and the `listed` lowest.
    """
    first_M = np.cumsum([0] + [len(head.prototype_class_P) for head in heads])
    with true_float32():
        similarities_BS = torch.cat([view.similarities_BP.float() for view in views], dim=1)
        similarities_RS = similarities_BS[torch.from_numpy(image_R)]
        connections_RS = _connections(heads, class_R).to(similarities_BS.device)
        points_RS = similarities_RS * connections_RS
        total_R = points_RS.double().sum(1)
        own_RS = torch.from_numpy(
            np.concatenate([h.prototype_class_P[None] == class_R[:, None] for h in heads], axis=1)
        )
        own_R = (points_RS.double() * own_RS.to(points_RS.device)).sum(1)
        if rival_R is None:
            order_RN = _highest(points_RS if by == "points" else similarities_RS, listed)
        else:
            rivals_RS = _connections(heads, rival_R).to(similarities_BS.device)
            order_RN = _ends(similarities_RS * (connections_RS - rivals_RS), listed)
        place_RN = order_RN.cpu().numpy()
        index_BS = torch.cat([view.index_BP for view in views], dim=1)
        cell_RN = index_BS[torch.from_numpy(image_R)].gather(1, order_RN).cpu().numpy()
    member_RN = np.searchsorted(first_M, place_RN, side="right") - 1
    maps, boxes_U4, pair_RN = _places(views, heads, image_R, place_RN, first_M, sizes_B2, image_sizes)
    columns_M = np.array([_columns(view, head) for view, head in zip(views, heads, strict=True)])
    return Ranking(
        image_R=image_R,
        class_R=class_R,
        total_R=total_R.cpu().numpy(),
        own_R=own_R.cpu().numpy(),
        member_RN=member_RN,
        prototype_RN=place_RN - first_M[member_RN],
        similarity_RN=similarities_RS.gather(1, order_RN).cpu().numpy(),
        connection_RN=connections_RS.gather(1, order_RN).cpu().numpy(),
        points_RN=points_RS.gather(1, order_RN).cpu().numpy(),
        row_RN=cell_RN // columns_M[member_RN],
        column_RN=cell_RN % columns_M[member_RN],
        box_RN4=boxes_U4[pair_RN],
        pair_RN=pair_RN,
        maps=maps,
        rival_connection_RN=None if rival_R is None else rivals_RS.gather(1, order_RN).cpu().numpy(),
    )


def _connections(heads: Sequence[Head], class_R: np.ndarray) -> Tensor:
    """Of each class to the prototypes of all members: only these rows, as all of them may be gigabytes."""
    label_R = torch.from_numpy(class_R)
    return torch.cat([head.weights_KP[label_R.to(head.weights_KP.device)] for head in heads], dim=1)


def _highest(values_RS: Tensor, count: int) -> Tensor:
    """Places of the highest values of each row; of equal ones the first, so that they don't change places with the size
    of the batch."""
    some = min(count + 1, values_RS.shape[1])
    highest, places_Rn = values_RS.topk(some, dim=1)
    if count < 1 or not bool((highest[:, 1:] == highest[:, :-1]).any()):
        return places_Rn[:, :count]
    return values_RS.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _ends(values_RS: Tensor, count: int) -> Tensor:
    """Places of the `count` highest and the `count` lowest values of each row, highest first."""
    order_RS = _highest(values_RS, values_RS.shape[1])
    count = min(count, -(-order_RS.shape[1] // 2))
    return torch.cat([order_RS[:, :count], order_RS[:, max(count, order_RS.shape[1] - count) :]], dim=1)


def _places(
    views: Sequence[View],
    heads: Sequence[Head],
    image_R: np.ndarray,
    place_RN: np.ndarray,
    first_M: np.ndarray,
    sizes_B2: np.ndarray,
    image_sizes: Sequence[int],
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Activation map and box of each distinct pair (image, prototype), and which pair belongs to which R, N."""
    keys_RN = image_R[:, None] * int(first_M[-1]) + place_RN
    keys_U, pair_RN = np.unique(keys_RN, return_inverse=True)
    image_U, place_U = keys_U // first_M[-1], keys_U % first_M[-1]
    maps: list[np.ndarray] = [np.empty(0)] * len(keys_U)
    boxes_U4 = np.empty((len(keys_U), 4), dtype=np.int64)
    for view, head, size, first, last in zip(views, heads, image_sizes, first_M[:-1], first_M[1:], strict=True):
        own = np.flatnonzero((place_U >= first) & (place_U < last))
        if not len(own):
            continue
        maps_uHW = head.maps(view.latent_BDHW, image_U[own], place_U[own] - first)
        boxes_U4[own] = scale_boxes(activation_boxes(maps_uHW, size), size, *sizes_B2[image_U[own]].T)
        for pair, map_HW in zip(own, maps_uHW.cpu().numpy(), strict=True):
            maps[pair] = map_HW
    return maps, boxes_U4, pair_RN.reshape(place_RN.shape)


def _columns(view: View, head: Head) -> int:
    """Patches in a row of the member's latent map."""
    return int(view.latent_BDHW.shape[3] - head.prototypes_PDhw.shape[3] + 1)
