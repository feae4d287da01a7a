"""Evidence of every prototype, or of all that are asked for, as arrays: nothing is ranked, nothing left out.

Legend as in `ranking`; here S are the prototypes asked for, of all members one after another, and C the cells of
their maps: prototype by prototype, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protopnet.errors import UserError
from protopnet.evidence.explanation import Explainer, explaining
from protopnet.evidence.ranking import View
from protopnet.model.boxes import activation_boxes, scale_boxes
from protopnet.model.bundle import Bundle
from protopnet.model.prototypes import true_float32
from protopnet.words import find_class

_PAIRS = 256  # maps enlarged at a time: 50 MB at 224 pixels
_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Asked:
    """Which prototypes, by number, of each member, and the rows and columns of their maps."""

    chosen_M: list[np.ndarray]
    shapes_M: list[tuple[int, int]]

    @property
    def prototypes(self) -> int:
        return sum(map(len, self.chosen_M))

    @property
    def cells(self) -> int:
        return sum(len(chosen) * H * W for chosen, (H, W) in zip(self.chosen_M, self.shapes_M, strict=True))

    def described(self) -> list[dict[str, Any]]:
        """A record a member, for JSON: what is where in the arrays."""
        return [
            {"member": member, "prototypes": chosen.tolist(), "map": list(shape)}
            for member, (chosen, shape) in enumerate(zip(self.chosen_M, self.shapes_M, strict=True))
        ]


def asked_for(bundles: Sequence[Bundle], classes: Sequence[str] | None, numbers: Sequence[int] | None) -> Asked:
    """Prototypes of these classes and those of these numbers, in each member; all where neither is given.

    `UserError` for a class or a number that there isn't, and for a black-box baseline.
    """
    networks = [explaining(bundle) for bundle in bundles]
    labels = [find_class(name, bundles[0].info.classes) for name in classes or ()]
    most = min(len(network.prototype_class) for network in networks)
    for number in numbers or ():
        if not 0 <= number < most:
            raise UserError(f"--explain_prototypes {number}: every member has prototypes 0 to {most - 1}")
    chosen_M, shapes_M = [], []
    for network in networks:
        class_P = network.prototype_class.cpu().numpy()
        wanted_P = np.isin(class_P, labels) | np.isin(np.arange(len(class_P)), list(numbers or ()))
        chosen_M.append(np.flatnonzero(wanted_P | (classes is None and numbers is None)))
        _, rows, columns = network.backbone.map_shape(network.preprocessing.size)
        height, width = network.prototypes.shape[2:]
        shapes_M.append((rows - height + 1, columns - width + 1))
    return Asked(chosen_M, shapes_M)


@dataclass(frozen=True)
class Everything:
    """`points`: similarity times connection to one class of each image. Places are row and column of the most similar
    patch; boxes (top, left, bottom, right) in pixels of the image as uploaded. Maps are of half precision."""

    similarity_BS: np.ndarray
    points_BS: np.ndarray
    place_BS2: np.ndarray
    box_BS4: np.ndarray
    map_BC: np.ndarray


@torch.inference_mode()
def everything(
    explainer: Explainer, views: Sequence[View], asked: Asked, class_B: np.ndarray, sizes_B2: np.ndarray
) -> Everything:
    """sizes_B2: width and height of each image as uploaded. A box costs some 0.2 ms of a core, the rest little."""
    parts = [_of_member(explainer, member, view, asked, class_B, sizes_B2) for member, view in enumerate(views)]
    return Everything(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def _of_member(
    explainer: Explainer, member: int, view: View, asked: Asked, class_B: np.ndarray, sizes_B2: np.ndarray
) -> tuple[np.ndarray, ...]:
    head, size = explainer.heads[member], explainer.sizes[member]
    chosen_S, B = asked.chosen_M[member], len(class_B)
    at_S = torch.from_numpy(chosen_S).to(view.similarities_BP.device)
    similarity_BS = view.similarities_BP[:, at_S].float().cpu()
    connection_BS = head.weights_KP[torch.from_numpy(class_B).to(head.weights_KP.device)][:, at_S].cpu()
    place_BS2 = np.stack(np.divmod(view.index_BP[:, at_S].cpu().numpy(), asked.shapes_M[member][1]), axis=2)
    box_NS4 = np.empty((B * len(chosen_S), 4), np.int32)
    map_NHW = np.empty((B * len(chosen_S), *asked.shapes_M[member]), np.float16)
    image_N, prototype_N = np.repeat(np.arange(B), len(chosen_S)), np.tile(chosen_S, B)
    with true_float32():
        for start in range(0, len(image_N), _PAIRS):
            some = slice(start, start + _PAIRS)
            maps_nHW = head.maps(view.latent_BDHW, image_N[some], prototype_N[some])
            box_NS4[some] = scale_boxes(activation_boxes(maps_nHW, size), size, *sizes_B2[image_N[some]].T)
            map_NHW[some] = maps_nHW.clamp(-_HALF, _HALF).half().cpu().numpy()
    return (
        similarity_BS.numpy(),
        (similarity_BS * connection_BS).numpy(),
        place_BS2.astype(np.int16),
        box_NS4.reshape(B, -1, 4),
        map_NHW.reshape(B, -1),
    )
