"""Which pixels a cell of the latent map can see.

The recursion over the layers' kernel, stride and padding. In most networks the result is larger
than the image; only VGG-11, 13 and 16 see less.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import nn

from protopnet.model.backbones import Backbone, is_timm

# Branches beside the main path, which has the larger kernels: ResNet's and RegNet's shortcuts.
_SHORTCUTS = ("downsample", "proj")


@dataclass(frozen=True)
class ReceptiveField:
    """Cells on a side of the map; pixels from one to the next (`jump`), seen by one (`size`), and the
    centre of the first (`start`)."""

    cells: int
    jump: float
    size: float
    start: float

    def after(self, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> "ReceptiveField":
        """The field behind one more layer. A prototype of height h is a layer of kernel h and stride 1."""
        rounded = ceil if ceil_mode else floor
        return ReceptiveField(
            cells=rounded((self.cells - kernel + 2 * padding) / stride) + 1,
            jump=self.jump * stride,
            size=self.size + (kernel - 1) * self.jump,
            start=self.start + ((kernel - 1) / 2 - padding) * self.jump,
        )

    def interval(self, cell: int, image_size: int) -> tuple[int, int]:
        """First pixel seen by a row or column of cells, and the first one beyond."""
        centre = self.start + cell * self.jump
        return max(int(centre - self.size / 2), 0), min(int(centre + self.size / 2), image_size)


def receptive_field(backbone: Backbone, image_size: int, pool: nn.Module | None = None) -> ReceptiveField:
    """The receptive field of the map's cells, for square images, behind `pool` if there is one.

    timm's networks are probed, which takes some twenty forward passes of one image. Of torchvision's the layers are
    followed; the whole image where they can't be one by one (squeeze-and-excitation,
    branches with strides); too large rather than too small where they branch without.
    """
    _, rows, _ = backbone.map_shape(image_size)
    if is_timm(backbone.name):
        return _behind(pool, _probed(backbone, rows, image_size))
    field = ReceptiveField(cells=image_size, jump=1, size=1, start=0.5)
    for name, layer in backbone.features.named_modules():
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return _whole_image(rows, image_size)
        if not any(part in _SHORTCUTS for part in name.split(".")):
            for kernel, stride, padding, ceil_mode in _window(layer):
                field = field.after(kernel, stride, padding, ceil_mode)
    if field.cells != rows:
        return _whole_image(rows, image_size)
    return _behind(pool, field)


def _behind(pool: nn.Module | None, field: ReceptiveField) -> ReceptiveField:
    for kernel, stride, padding, ceil_mode in _window(pool or nn.Identity()):
        field = field.after(kernel, stride, padding, ceil_mode)
    return field


@torch.inference_mode()
def _probed(backbone: Backbone, rows: int, image_size: int) -> ReceptiveField:
    """Found by looking: pixels that aren't numbers make no numbers of every cell that sees them, and of no other.

    The whole image where attention or pooling sees it, or where the cells' fields aren't one field moved along.
    """
    device = next(backbone.parameters()).device

    def touched(first: int, end: int) -> list[bool]:
        """Which rows of cells see any of these rows of pixels."""
        x = torch.zeros(1, 3, image_size, image_size, device=device)
        x[:, :, first:end] = torch.nan
        return backbone(x)[0].isnan().any(0).any(1).tolist()

    def beyond(cell: int) -> int:
        return bisect_left(range(image_size), True, key=lambda row: not touched(row, image_size)[cell])

    last = rows - 1
    if touched(image_size - 1, image_size)[0] or touched(0, 1)[last] or rows < 3:
        return _whole_image(rows, image_size)
    end, first = beyond(0), bisect_left(range(image_size), True, key=lambda row: touched(0, row + 1)[last])
    jump = beyond(1) - end
    start = (end + first - last * jump) / 2
    field = ReceptiveField(rows, jump, 2 * (end - start), start)
    for row in (image_size // 3, image_size // 2):
        expected = [low <= row < high for low, high in (field.interval(cell, image_size) for cell in range(rows))]
        if touched(row, row + 1) != expected:
            return _whole_image(rows, image_size)
    return field


def _window(layer: nn.Module) -> Iterator[tuple[int, int, int, bool]]:
    """Kernel, stride, padding and rounding of a layer that looks at neighbours."""
    if isinstance(layer, nn.Conv2d):
        kernel = (_one(layer.kernel_size) - 1) * _one(layer.dilation) + 1
        yield kernel, _one(layer.stride), _one(layer.padding), False  # type: ignore[arg-type]
    elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        yield _one(layer.kernel_size), _one(layer.stride), _one(layer.padding), layer.ceil_mode


def _one(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _whole_image(cells: int, image_size: int) -> ReceptiveField:
    jump = image_size / cells
    return ReceptiveField(cells=cells, jump=jump, size=2 * image_size, start=jump / 2)
