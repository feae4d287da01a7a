"""From activation maps to boxes on images.

An activation map is enlarged to the image with OpenCV's INTER_CUBIC (a = -0.75, half-pixel centres,
border repeated), and a box drawn around what is most active. All boxes are (top, left, bottom,
right), half-open, in pixels; `scale_boxes` takes them from the network's input to the image itself.
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from protopnet.model.receptive_field import ReceptiveField

PERCENTILE = 95.0


def upsample(maps_NHW: Tensor, height: int, width: int) -> Tensor:
    """The maps enlarged to `height` x `width` pixels: `maps_NYX`, same dtype."""
    return F.interpolate(maps_NHW[:, None], (height, width), mode="bicubic", align_corners=False)[:, 0]


def activation_boxes(maps_NHW: Tensor, image_size: int, percentile: float = PERCENTILE) -> np.ndarray:
    """Box around the most active pixels of each map on a square image: int64, N x 4."""
    return high_boxes(upsample(maps_NHW, image_size, image_size), percentile)


def high_boxes(maps_NYX: Tensor, percentile: float = PERCENTILE) -> np.ndarray:
    """The tightest box around all that lies at or above the percentile: int64, N x 4.

    One box even where that is several blobs, as in the authors' figures.
    """
    maps = maps_NYX.detach().cpu().numpy()
    thresholds = np.percentile(maps.reshape(len(maps), -1), percentile, axis=1)
    high = maps >= thresholds[:, None, None]
    top, bottom = _extent(high.any(axis=2))
    left, right = _extent(high.any(axis=1))
    return np.stack([top, left, bottom, right], axis=1)


def receptive_field_boxes(
    cells_N2: Sequence[tuple[int, int]] | np.ndarray,
    field: ReceptiveField,
    image_size: int,
    prototype_shape: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """What the patches at these rows and columns of the latent map can see: int64, N x 4.

    `field` is that of the latent cells; a prototype of several cells sees more.
    """
    rows, columns = (field.after(kernel=side, stride=1, padding=0) for side in prototype_shape)
    boxes = np.empty((len(cells_N2), 4), dtype=np.int64)
    for n, (row, column) in enumerate(cells_N2):
        boxes[n, [0, 2]] = rows.interval(int(row), image_size)
        boxes[n, [1, 3]] = columns.interval(int(column), image_size)
    return boxes


def cell_boxes(
    cells_N2: Sequence[tuple[int, int]] | np.ndarray,
    map_shape: tuple[int, int],
    image_size: int,
    prototype_shape: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """The patches themselves, as if the latent map lay over the image: int64, N x 4."""
    cells = np.asarray(cells_N2, dtype=np.int64).reshape(-1, 2)
    shape = np.asarray(map_shape)
    return np.concatenate([cells * image_size // shape, -(-(cells + prototype_shape) * image_size // shape)], axis=1)


def scale_boxes(boxes_N4: np.ndarray, image_size: int, width: int, height: int) -> np.ndarray:
    """The boxes on an image of `width` x `height` that was resized to `image_size` on each side.

    Rounded outwards, so that a pixel that was in a box stays in it.
    """
    boxes = np.asarray(boxes_N4, dtype=np.int64).reshape(-1, 4)
    size = np.array([height, width])
    return np.concatenate([boxes[:, :2] * size // image_size, -(-boxes[:, 2:] * size // image_size)], axis=1)


def _extent(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First marked position of each row, and the one behind the last."""
    return marked.argmax(axis=1), marked.shape[1] - marked[:, ::-1].argmax(axis=1)
