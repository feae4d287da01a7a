"""From activation maps to boxes on images.

An activation map is enlarged to the image with OpenCV's INTER_CUBIC (a = -0.75, half-pixel centres,
border repeated), and a box drawn around what is most active. All boxes are (top, left, bottom,
right), half-open, in pixels; `scale_boxes` takes them from the network's input to the image itself.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protopnet.model.receptive_field import ReceptiveField

PERCENTILE = 95.0


def upsample(maps_NHW: Tensor, height: int, width: int) -> Tensor:
    """The maps enlarged to `height` x `width` pixels: `maps_NYX`, same dtype.

    Bicubic weights are the same for every row and for every column: two small matrix products, four times as fast
    as `F.interpolate` on a CPU.
    """
    rows_YH = _bicubic(maps_NHW.shape[1], height).to(maps_NHW)
    columns_XW = _bicubic(maps_NHW.shape[2], width).to(maps_NHW)
    return rows_YH @ maps_NHW @ columns_XW.t()


@lru_cache(maxsize=64)
def _bicubic(cells: int, pixels: int) -> Tensor:
    """Weight of each cell in each pixel along one side, float64: pixels x cells."""
    unit_vectors_C1C1 = torch.eye(cells, dtype=torch.float64)[:, None, :, None]
    enlarged = F.interpolate(unit_vectors_C1C1, (pixels, 1), mode="bicubic", align_corners=False)
    return enlarged[:, 0, :, 0].t().contiguous()


def activation_boxes(maps_NHW: Tensor, image_size: int, percentile: float = PERCENTILE) -> np.ndarray:
    """Box around the most active pixels of each map on a square image: int64, N x 4."""
    return high_boxes(upsample(maps_NHW, image_size, image_size), percentile)


def high_boxes(maps_NYX: Tensor, percentile: float = PERCENTILE) -> np.ndarray:
    """The tightest box around all that lies at or above the percentile: int64, N x 4.

    One box even where that is several blobs, as in the authors' figures.
    """
    maps_NYX = maps_NYX.detach()
    high_NYX = maps_NYX >= _percentiles(maps_NYX.flatten(1), percentile)[:, None, None]
    high: np.ndarray = high_NYX.cpu().numpy()
    top, bottom = _extent(np.any(high, axis=2))
    left, right = _extent(np.any(high, axis=1))
    return np.stack([top, left, bottom, right], axis=1)


def _percentiles(values_NI: Tensor, percentile: float) -> Tensor:
    """The percentile of each row as numpy has it (linear between its neighbours), from the few values above it."""
    place = percentile / 100 * (values_NI.shape[1] - 1)
    below = int(place)
    highest = values_NI.topk(values_NI.shape[1] - below, sorted=False).values
    if highest.shape[1] == 1:
        return highest[:, 0]
    low, high = highest.topk(2, largest=False).values.unbind(1)
    return torch.lerp(low, high, place - below)


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


def scale_boxes(boxes_N4: np.ndarray, image_size: int, width: int | np.ndarray, height: int | np.ndarray) -> np.ndarray:
    """The boxes on an image of `width` x `height` that was resized to `image_size` on each side.

    One width and height for all boxes, or one for each. Rounded outwards, so that a pixel that was in a box stays in it.
    """
    boxes = np.asarray(boxes_N4, dtype=np.int64).reshape(-1, 4)
    size = np.stack([height, width], axis=-1)
    return np.concatenate([boxes[:, :2] * size // image_size, -(-boxes[:, 2:] * size // image_size)], axis=1)


def _extent(marked_NI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First marked position of each row, and the one behind the last."""
    return marked_NI.argmax(axis=1), marked_NI.shape[1] - marked_NI[:, ::-1].argmax(axis=1)
