"""Images changed on purpose, to see whether an explanation holds: noise, and pixels deleted or inserted.

Everything happens in normalised space, where 0 is the mean colour. Shapes: B images, size x size pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from protopnet.imaging import IMAGENET_STD

NOISE_DEVIATION, NOISE_LIMIT = 0.2, 0.25
STEPS = 28  # 1,792 pixels each at 224 x 224, as published

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
    """How a score falls as the most salient pixels are blanked, and how it rises as they are put onto a blank image.

    `probability` gives a score to each of a batch of images. Pixels go in equal steps in the order of falling saliency,
    of equal ones the first; blank is 0. Each curve has steps + 1 points, with none and with all of the pixels.
    """
    pixels = saliency_HW.numel()
    order = saliency_HW.flatten().sort(descending=True, stable=True).indices
    rank_HW = torch.empty_like(order).scatter_(0, order, torch.arange(pixels, device=order.device))
    moved_S = torch.linspace(0, pixels, steps + 1, dtype=torch.float64).round().long().to(order.device)
    moved_S1HW = rank_HW.view(1, 1, *saliency_HW.shape) < moved_S[:, None, None, None]
    # An image of which all is deleted is one into which nothing is inserted: the ends of the curves are shared.
    changed_S1HW = torch.cat([~moved_S1HW, moved_S1HW[1:-1]])
    images_S3HW = (image_3HW[None] * changed_S1HW).contiguous(memory_format=torch.channels_last)
    scores = probability(images_S3HW).tolist()
    deletion, between = scores[: steps + 1], scores[steps + 1 :]
    return deletion, [deletion[-1], *between, deletion[0]]


def area_under(curve: Sequence[float]) -> float:
    """Area under a curve of evenly spaced points over [0, 1], by trapezoids."""
    return float((sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1))
