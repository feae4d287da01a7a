"""Images changed on purpose, to see whether an explanation holds: noise, pixels deleted or inserted, what is beside a box.

Everything happens in normalised space, where 0 is the mean colour. Shapes: B images, size x size pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from protopnet.evidence.saliency import blurred
from protopnet.imaging import IMAGENET_STD

NOISE_DEVIATION, NOISE_LIMIT = 0.2, 0.25
STEPS = 28  # 1,792 pixels each at 224 x 224, as published
BLUR = 5 / 224  # of the side: deviation, as RISE's, whose Gaussian ends after one of them

_SEED_NOISE = 7  # last word of the seed, so that no two purposes share random numbers


def with_noise(
    images_B3HW: Tensor, image_ids_B: Sequence[int], seed: int, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """The images plus normal noise of deviation 0.2, cut off at 0.25, in units of ImageNet's deviation.

    Drawn from the seed and the image's id: the same for any batch, shard or order. std: what the images were divided
    by; so the noise on the pixels is the same for any network.
    """
    noise = np.empty(images_B3HW.shape, dtype=np.float32)
    for place, image_id in enumerate(image_ids_B):
        random = np.random.default_rng((seed, int(image_id), _SEED_NOISE))
        noise[place] = NOISE_DEVIATION * random.standard_normal(noise.shape[1:], dtype=np.float32)
    noise.clip(-NOISE_LIMIT, NOISE_LIMIT, out=noise)
    noise *= (np.array(IMAGENET_STD) / np.array(std)).astype(np.float32)[:, None, None]
    return images_B3HW + torch.from_numpy(noise).to(images_B3HW.device)


def deletion_and_insertion(
    probability: Callable[[Tensor], Tensor], image_3HW: Tensor, saliency_HW: Tensor, steps: int = STEPS
) -> tuple[list[float], list[float]]:
    """How a score falls as the most salient pixels are blanked, and how it rises as they are put onto the blurred image.

    `probability` gives a score to each of a batch of images. Pixels go in equal steps in the order of falling saliency,
    of equal ones the first; blank is 0. Each curve has steps + 1 points, with none and with all of the pixels.
    """
    pixels = saliency_HW.numel()
    order = saliency_HW.flatten().sort(descending=True, stable=True).indices
    rank_HW = torch.empty_like(order).scatter_(0, order, torch.arange(pixels, device=order.device))
    moved_S = torch.linspace(0, pixels, steps + 1, dtype=torch.float64).round().long().to(order.device)
    moved_S1HW = rank_HW.view(1, 1, *saliency_HW.shape) < moved_S[:, None, None, None]
    deleted_S3HW = image_3HW * ~moved_S1HW
    inserted_S3HW = torch.where(
        moved_S1HW[:-1], image_3HW, out_of_focus(image_3HW)
    )  # the last is the image: deletion's first
    images_S3HW = torch.cat([deleted_S3HW, inserted_S3HW]).contiguous(memory_format=torch.channels_last)
    scores = probability(images_S3HW).tolist()
    deletion, insertion = scores[: steps + 1], scores[steps + 1 :]
    return deletion, [*insertion, deletion[0]]


def out_of_focus(image_3HW: Tensor) -> Tensor:
    """So blurred that hardly more than colours is left of it."""
    return blurred(image_3HW[None], BLUR * image_3HW.shape[2])[0]


def only_in_focus(image_3HW: Tensor, boxes_U4: np.ndarray) -> Tensor:
    """The image once for each box, out of focus beside it."""
    images_U3HW = out_of_focus(image_3HW).repeat(len(boxes_U4), 1, 1, 1)
    for image, (top, left, bottom, right) in zip(images_U3HW, boxes_U4.tolist(), strict=True):
        image[:, top:bottom, left:right] = image_3HW[:, top:bottom, left:right]
    return images_U3HW.contiguous(memory_format=torch.channels_last)


def overlaps(boxes_U4: np.ndarray, others_U4: np.ndarray) -> np.ndarray:
    """What each box and the other have in common, over what they cover together."""
    corner_U2 = np.maximum(boxes_U4[:, :2], others_U4[:, :2])
    common_U = (np.minimum(boxes_U4[:, 2:], others_U4[:, 2:]) - corner_U2).clip(min=0).prod(1)
    areas_U = sum((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (boxes_U4, others_U4))
    return np.asarray(common_U / (areas_U - common_U))


def area_under(curve: Sequence[float]) -> float:
    """Area under a curve of evenly spaced points over [0, 1], by trapezoids."""
    return float((sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1))
