"""The part of an image network up to its feature map: torchvision's by their names, timm's as `timm/NAME`.

Tensors keep the names they have there, below `features.`. Weights are read by `weights.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from protopnet.errors import UserError
from protopnet.imaging import Preprocessing
from protopnet.model import timm_networks, torchvision_networks
from protopnet.model.cutting import first_line

BACKBONES = torchvision_networks.BACKBONES


def _output(features: nn.Module, x_B3HW: Tensor) -> Tensor:
    out = features(x_B3HW)
    return out["map"] if isinstance(out, dict) else out  # traced networks return a dict


class Backbone(nn.Module):
    """A network up to its feature map: x_B3HW -> f_BCHW, for images prepared as `preprocessing` says.

    `name` and `cut` are the settings it was built from, `channels` is C, `whole` names the tensors of the network
    before it was cut, `read` finds the map.
    """

    def __init__(
        self,
        name: str,
        cut: str | None,
        features: nn.Module,
        preprocessing: Preprocessing,
        whole: Sequence[str],
        read: Callable[[nn.Module, Tensor], Tensor] = _output,
    ) -> None:
        super().__init__()
        self.name = name
        self.cut = cut
        self.features = features
        self.preprocessing = preprocessing
        self.whole = frozenset(whole)
        self.read = read
        self._shapes: dict[int, tuple[int, int, int]] = {}
        self.channels = self.map_shape(preprocessing.size)[0]

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return self.read(self.features, x_B3HW)

    def map_shape(self, image_size: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the map of a square image, found with an empty one."""
        if image_size not in self._shapes:
            self._shapes[image_size] = self._map_shape(image_size)
        return self._shapes[image_size]

    def _map_shape(self, image_size: int) -> tuple[int, int, int]:
        training = {module for module in self.modules() if module.training}
        self.eval()
        try:
            weight = next(self.parameters(), torch.empty(0))
            # Not on the meta device, which would load torch's compiler: some 3 s of CPU time for 0.05 s.
            with torch.no_grad():
                out = self(weight.new_zeros(1, 3, image_size, image_size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{self.name} can't take images of {image_size} x {image_size}: change model.image_size "
                f"or model.cut ({first_line(error)})"
            ) from error
        finally:
            for module in training:
                module.training = True
        if not isinstance(out, Tensor) or out.ndim != 4:
            raise UserError(f"model.cut {self.cut!r} of {self.name} has no feature map (channels, rows, columns)")
        return out.shape[1], out.shape[2], out.shape[3]


def is_timm(name: str) -> bool:
    return name.startswith(timm_networks.PREFIX)


def build_backbone(name: str, cut: str | None = None, image_size: int = 224) -> Backbone:
    """The named network up to `cut`, with fresh weights, for square images of `image_size` pixels.

    Raises UserError for an unknown name or cut, a cut whose output is no map, or images too small for it.
    """
    if not is_timm(name):
        features, whole = torchvision_networks.build(name, cut)
        return Backbone(name, cut, features, Preprocessing(size=image_size), whole)
    preprocessing = timm_networks.trained_for(name).model_copy(update={"size": image_size})
    features, read, whole = timm_networks.build(name, cut, image_size)
    return Backbone(name, cut, features, preprocessing, whole, read)
