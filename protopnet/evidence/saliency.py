"""Which pixels the similarity of a prototype to its place rests on.

LayerCAM (Jiang et al. 2021), of a similarity instead of a class: gradient times activation, where that is positive, in
layers whose maps are finer than the latent one. An enlarged similarity map says where else the prototype would be seen;
this says what it is seen by.

Legend: U pieces of evidence, C channels, H W rows and columns, Y X pixels.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protopnet.evidence.pieces import Piece, similarities
from protopnet.model.boxes import upsample
from protopnet.model.network import ProtoPNet

MAP_SIDE = 56  # of a map that is kept, at most: it is smooth
LAYERS = 2
_TINY = torch.finfo(torch.float32).tiny
_SMOOTH = 5 / 224  # of the side: deviation of the Gaussian over it


def saliency(network: ProtoPNet, images_U3YX: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Each pixel's share of what a similarity rests on: `shares_UYX`, which add up to 1 (0 where there is no gradient).

    The higher of the maps, each as high as the other, of the two layers that are the next finer than the latent map; from
    the pixels themselves where a network has none, or maps that aren't channels, rows, columns.
    """
    seen: dict[int, Tensor] = {}
    latent: list[int] = []

    def see(module: nn.Module, given: tuple[object, ...], output: object) -> None:
        """Keep what each stage gave: the input of the outermost module, the last that ends, which makes it coarser."""
        if _is_map(output) and given and _is_map(given[0]) and given[0].shape[3] > output.shape[3]:
            seen[given[0].shape[3]] = given[0]
        if module is network.backbone and _is_map(output):
            latent.append(output.shape[3])

    hooks = [module.register_forward_hook(see) for module in network.backbone.modules()]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            pixels_U3YX = images_U3YX.clone().requires_grad_(True)  # tensors of inference mode have no gradients
            similarity_U = similarities(network, pixels_U3YX, pieces)
        finally:
            for hook in hooks:
                hook.remove()
        side = images_U3YX.shape[3]
        sides = [size for size in sorted(seen) if latent[0] < size < side and seen[size].requires_grad]
        layers = [seen[size] for size in sides[:LAYERS]] or [pixels_U3YX]
        gradients = torch.autograd.grad(similarity_U.sum(), layers, allow_unused=True)
    highest_UYX = images_U3YX.new_zeros(len(pieces), side, side)
    for layer_UCHW, gradient_UCHW in zip(layers, gradients, strict=True):
        if gradient_UCHW is None:
            continue
        product_UCHW = (layer_UCHW * gradient_UCHW).detach()
        # An image has no activations: its colours are above and below a mean.
        map_UHW = product_UCHW.sum(1).abs() if layer_UCHW is pixels_U3YX else product_UCHW.clamp(min=0).sum(1)
        map_UYX = blurred(upsample(map_UHW, side, side).clamp(min=0)[:, None], _SMOOTH * side)[:, 0]
        highest_UYX = torch.maximum(highest_UYX, map_UYX / map_UYX.amax((1, 2), keepdim=True).clamp(min=_TINY))
    return _shares(highest_UYX)


def _is_map(value: object) -> TypeGuard[Tensor]:
    """Whether it is of channels, rows and columns, as of square images."""
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == value.shape[3]


def blurred(images_BCYX: Tensor, deviation: float) -> Tensor:
    """Under a Gaussian of so many pixels; at the edges those there are are repeated."""
    reach = max(1, round(3 * deviation))
    distance = torch.arange(-reach, reach + 1, device=images_BCYX.device, dtype=images_BCYX.dtype)
    weights = torch.softmax(-(distance**2) / (2 * deviation**2), dim=0)
    flat_N1YX = F.pad(images_BCYX.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    across_N1YX = F.conv2d(flat_N1YX, weights.view(1, 1, 1, -1))
    return F.conv2d(across_N1YX, weights.view(1, 1, -1, 1)).view(images_BCYX.shape)


def _shares(maps_UYX: Tensor) -> Tensor:
    return maps_UYX / maps_UYX.sum((1, 2), keepdim=True).clamp(min=_TINY)


def small(maps_UYX: Tensor) -> Tensor:
    """At most `MAP_SIDE` cells a side, each with what its pixels have together."""
    side = min(MAP_SIDE, maps_UYX.shape[1])
    return _shares(F.adaptive_avg_pool2d(maps_UYX[:, None], side)[:, 0])
