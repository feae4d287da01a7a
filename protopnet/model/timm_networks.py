"""timm's networks, convolutional and transformers, cut at one of the maps that timm itself offers.

Each of timm's networks lists its intermediate maps (`feature_info`) and computes them on request
(`forward_intermediates`): tokens come out as a map, prefix tokens dropped, channels first. What lies
beyond the cut is pruned by timm. timm is imported where it is used: other runs pay nothing for it.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from protopnet.errors import UserError
from protopnet.imaging import Preprocessing
from protopnet.model.cutting import first_line, unknown

PREFIX = "timm/"
_EXAMPLES = ("timm/tf_efficientnet_lite0", "timm/convnext_tiny", "timm/vit_small_patch14_dinov2")


@dataclass(frozen=True)
class Intermediate:
    """Reads one of a timm network's maps; `last` is normalised, as timm's own `forward_features`."""

    index: int
    last: bool

    def __call__(self, network: nn.Module, x_B3HW: Tensor) -> Tensor:
        read: Any = network.forward_intermediates
        maps = read(x_B3HW, indices=[self.index], norm=self.last, stop_early=True, intermediates_only=True)
        return maps[0]


def trained_for(name: str) -> Preprocessing:
    """Size, mean and deviation of the images that the weights of this name want (`timm/NAME` or `timm/NAME.TAG`)."""
    import timm

    network, _, tag = name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(network):
        raise UserError(unknown("model.backbone", name, _with_prefix(timm.list_models()), _EXAMPLES, "timm"))
    tagged = _with_prefix(timm.list_pretrained(f"{network}.*"))
    if tag and name not in tagged:
        raise UserError(unknown("model.backbone", name, tagged, tagged or [PREFIX + network], "timm"))
    trained: Any = timm.get_pretrained_cfg(name.removeprefix(PREFIX), allow_unregistered=True)
    if trained is None:
        return Preprocessing(size=224)
    return Preprocessing(size=max(trained.input_size[1:]), mean=trained.mean, std=trained.std)


def build(name: str, cut: str | None, image_size: int) -> tuple[nn.Module, Intermediate, list[str]]:
    """The network up to `cut` with fresh weights, how its map is read, and the names of the tensors of all of it.

    Nothing in it is drawn at random: dropout and stochastic depth are off. Raises UserError for an unknown cut,
    or a size of image that the network can't be made for.
    """
    network = _create(name, image_size, pretrained=False)
    whole = list(network.state_dict())
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "prune_intermediate_layers"):
        raise UserError(f"model.backbone {name}: timm offers no feature maps of this network; take another")
    stages = [stage["module"] for stage in _feature_info(network)]
    if cut is not None and cut not in stages:
        raise UserError(f"{name}: " + unknown("model.cut", cut, stages, stages, "its feature maps"))
    index = len(stages) - 1 if cut is None else stages.index(cut)
    last = index == len(stages) - 1
    prune: Any = network.prune_intermediate_layers
    prune([index], prune_norm=not last, prune_head=True)
    return network, Intermediate(index, last), whole


def download(name: str, image_size: int) -> dict[str, Tensor]:
    """timm's own weights of this name and tag, the whole network, from its hub or its cache."""
    try:
        return dict(_create(name, image_size, pretrained=True).state_dict())
    except UserError:
        raise
    except Exception as error:  # whatever the hub's client raises without a network
        raise UserError(
            f"model.weights pretrained: can't get {name}: {first_line(error)}; give a file instead"
        ) from error


def converted(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the names and sizes of the network's authors, in timm's and for its size of image.

    timm knows how for each family (positions of other sizes, DINOv2's and Swin's own files); unchanged where not.
    """
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(state)
    try:
        return dict(convert(dict(state), network))
    except Exception:  # written for files of that family: anything else makes it stumble
        return dict(state)


def _create(name: str, image_size: int, *, pretrained: bool) -> nn.Module:
    import timm
    from timm.layers import DropPath

    trained: Any = timm.get_pretrained_cfg(name.removeprefix(PREFIX), allow_unregistered=True)
    sized: dict[str, Any] = {"img_size": image_size} if trained is not None and trained.fixed_input_size else {}
    try:
        network = timm.create_model(name.removeprefix(PREFIX), pretrained=pretrained, **sized)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"{name} can't be made for images of {image_size} x {image_size}: change model.image_size "
            f"({first_line(error)})"
        ) from error
    for module in network.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, _DropoutNd):
            module.p = 0.0
    return network


def _feature_info(network: Any) -> list[dict[str, Any]]:
    info = network.feature_info
    return list(getattr(info, "info", info))


def _with_prefix(names: list[str]) -> list[str]:
    return [PREFIX + name for name in names]
