"""What a similarity rests on: how far it falls when what the patch sees is changed in one respect.

After Nauta et al. 2021 ("This looks like that, because …"), who change whole images; here what is outside the
receptive field stays.

Legend: U pieces of evidence, Y X pixels, y x those of a patch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from protopnet.evidence.pieces import Piece, similarities
from protopnet.evidence.saliency import blurred
from protopnet.imaging import Preprocessing
from protopnet.model.boxes import receptive_field_boxes
from protopnet.model.network import ProtoPNet
from protopnet.model.receptive_field import ReceptiveField

# Shares of a patch's side: deviation (1 pixel at least), farthest a pixel is moved; waves along a side.
_BLUR, _BENT, _WAVES = 0.02, 0.04, 3


def _hue(by: float, patch_3yx: Tensor) -> Tensor:
    from torchvision.transforms.functional import adjust_hue  # here: importing it takes seconds

    return adjust_hue(patch_3yx, by)


def _contrast(patch_3yx: Tensor) -> Tensor:
    from torchvision.transforms.functional import adjust_contrast

    return adjust_contrast(patch_3yx, 0.4)


def _sharpness(patch_3yx: Tensor) -> Tensor:
    return blurred(patch_3yx[None], max(1.0, _BLUR * max(patch_3yx.shape[1:])))[0]


def _shape(patch_3yx: Tensor) -> Tensor:
    """Bent, by the same waves in every patch."""
    y, x = (torch.linspace(0, 2 * torch.pi * _WAVES, side, device=patch_3yx.device) for side in patch_3yx.shape[1:])
    across_yx, down_yx = torch.sin(y)[:, None] * torch.cos(x), torch.cos(y)[:, None] * torch.sin(x)
    displacement_1yx2 = 2 * _BENT * torch.stack([across_yx, down_yx], dim=-1)[None]  # the patch is 2 wide
    from torchvision.transforms.v2.functional import elastic

    return elastic(patch_3yx, displacement_1yx2)


# A kind of change may be several, of which the mean counts.
CHANGES: Mapping[str, Sequence[Callable[[Tensor], Tensor]]] = {
    "hue": (partial(_hue, 1 / 3), partial(_hue, -1 / 3)),
    "contrast": (_contrast,),
    "sharpness": (_sharpness,),
    "shape": (_shape,),
}


@torch.inference_mode()
def falls(
    network: ProtoPNet, field: ReceptiveField, images_U3YX: Tensor, pieces: Sequence[Piece]
) -> list[dict[str, float]]:
    """By how much each similarity falls when what its patch can see is changed."""
    before_U = similarities(network, images_U3YX, pieces)
    cells_U2 = np.array(pieces)[:, 2:]
    height, width = network.prototypes.shape[2:]
    boxes_U4 = receptive_field_boxes(cells_U2, field, images_U3YX.shape[3], (height, width)).tolist()
    plain_U3YX = _pixels(images_U3YX, network.preprocessing)
    found: list[dict[str, float]] = [{} for _ in pieces]
    for kind, ways in CHANGES.items():
        fall_U = torch.zeros_like(before_U)
        for change in ways:
            changed_U3YX = plain_U3YX.clone()
            for image_3YX, (top, left, bottom, right) in zip(changed_U3YX, boxes_U4, strict=True):
                image_3YX[:, top:bottom, left:right] = change(image_3YX[:, top:bottom, left:right])
            normal_U3YX = _normal(changed_U3YX, network.preprocessing)
            fall_U += (before_U - similarities(network, normal_U3YX, pieces)) / len(ways)
        for of_piece, fall in zip(found, fall_U.tolist(), strict=True):
            of_piece[kind] = fall
    return found


def _pixels(images_U3YX: Tensor, prepared: Preprocessing) -> Tensor:
    """Normalised images as colours from 0 to 1."""
    mean_311, std_311 = (images_U3YX.new_tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    return (images_U3YX * std_311 + mean_311).clamp(0, 1)


def _normal(pixels_U3YX: Tensor, prepared: Preprocessing) -> Tensor:
    mean_311, std_311 = (pixels_U3YX.new_tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    return ((pixels_U3YX - mean_311) / std_311).contiguous(memory_format=torch.channels_last)
