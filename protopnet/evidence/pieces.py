"""Pieces of evidence that are looked at more closely, on request: a prototype and the place where it sees itself.

Unlike all other evidence this asks the network again (`saliency`, `changes`), so it takes a network and its input,
wherever those are; what was found is put into explanations afterwards (`filled`).

Legend: U pieces, H W rows and columns of the latent map, Y X pixels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from protopnet.evidence.records import Evidence, Explanation, Falls
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import distance_maps_of_pairs, similarity, true_float32


class Piece(NamedTuple):
    """A prototype, and row and column of the latent map of an image of the batch."""

    image: int
    prototype: int
    row: int
    column: int


class Closer(NamedTuple):
    """What was found of one. saliency: shares of 1, on a small map. falls: of the similarity, by kind of change."""

    saliency_YX: np.ndarray | None = None
    falls: dict[str, float] | None = None


def similarities(network: ProtoPNet, images_U3YX: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Similarity of each prototype to its place, on an image of its own: `similarity_U`. Differentiable."""
    each = np.arange(len(pieces))
    _, prototype_U, row_U, column_U = np.array(pieces).T
    latent_UDHW = network.latent(images_U3YX)
    with true_float32():
        prototypes_PDhw = network.prototypes.detach()
        distances_UHW = distance_maps_of_pairs(latent_UDHW, prototypes_PDhw, each, prototype_U, network.kind)
        return similarity(distances_UHW[each, row_U, column_U], network.kind, network.epsilon)


def pieces_of(explanations: Sequence[Explanation], member: int) -> list[Piece]:
    """Of all rows of a batch's explanations, those of a member, each once."""
    return list(
        dict.fromkeys(
            Piece(image, row.prototype, row.row, row.column)
            for image, explanation in enumerate(explanations)
            for row in explanation.rows()
            if row.member == member
        )
    )


def filled(explanations: Sequence[Explanation], found: Sequence[Mapping[Piece, Closer]]) -> list[Explanation]:
    """The explanations with what was found of the pieces of each member."""

    def with_closer(image: int, row: Evidence) -> dict[str, object]:
        closer = found[row.member][Piece(image, row.prototype, row.row, row.column)]
        values = None if closer.saliency_YX is None else closer.saliency_YX.round(6).tolist()
        return {"saliency_map": values, "falls": None if closer.falls is None else Falls(**closer.falls)}

    return [each.with_rows(partial(with_closer, image)) for image, each in enumerate(explanations)]
