"""Which pixels a cell of the latent map can see.

The recursion over the layers' kernel, stride and padding. In most networks the result is larger
than the image; only VGG-11, 13 and 16 see less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor

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


def receptive_field(backbone: Backbone, image_size: int) -> ReceptiveField:
    """The receptive field of the map's cells, for square images.

    The whole image where the layers can't be followed one by one (attention, squeeze-and-excitation,
    branches with strides) and for timm's networks; too large rather than too small where they branch without.
    """
    _, rows, _ = backbone.map_shape(image_size)
    if is_timm(backbone.name):
        return _whole_image(rows, image_size)
    field = ReceptiveField(cells=image_size, jump=1, size=1, start=0.5)
    for name, layer in backbone.features.named_modules():
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return _whole_image(rows, image_size)
        if not any(part in _SHORTCUTS for part in name.split(".")):
            for kernel, stride, padding, ceil_mode in _window(layer):
                field = field.after(kernel, stride, padding, ceil_mode)
    if field.cells != rows:
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
