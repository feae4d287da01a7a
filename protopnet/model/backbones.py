"""Torchvision classification networks, cut where their feature map comes out.

The 17 networks of the ProtoPNet paper are cut where its authors cut them (VGG after its last
pooling, ResNet after `layer4`, DenseNet after its last norm and a ReLU); any other by name. Tensors
keep torchvision's names, below `features.`. Weights are read by `weights.py`.
"""

import difflib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from protopnet.errors import UserError
from protopnet.model.zoo import create_feature_extractor, get_model, list_models, torchvision

BACKBONES = (
    *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
)

# Where a network is cut when `model.cut` is left out, by the beginning of its name.
_CUTS = {
    **dict.fromkeys(("vgg", "densenet", "squeezenet", "alexnet", "mobilenet", "efficientnet", "convnext"), "features"),
    **dict.fromkeys(("resnet", "resnext", "wide_resnet"), "layer4"),
    "mnasnet": "layers",
    "regnet": "trunk_output",
    "shufflenet": "conv5",
    "googlenet": "inception5b",
    "inception": "Mixed_7c",
    "swin": "permute",
    "maxvit": "blocks.3",
}
# Networks whose forward isn't simply their children one after the other.
_BRANCHING = ("googlenet", "inception", "maxvit", "vit")


class Backbone(nn.Module):
    """The part of a torchvision network up to its feature map: x_B3HW -> f_BCHW.

    `name` and `cut` are the settings it was built from, `channels` is C.
    """

    def __init__(self, name: str, cut: str | None, features: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.cut = cut
        self.features = features
        self.channels = self.map_shape(224)[0]

    def forward(self, x_B3HW: Tensor) -> Tensor:
        out = self.features(x_B3HW)
        return out["map"] if isinstance(out, dict) else out  # traced networks return a dict

    def map_shape(self, image_size: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the map of a square image, found without computing it."""
        features = self.features
        tensors = dict(features.named_parameters()) | dict(features.named_buffers())
        training = {module for module in features.modules() if module.training}
        features.eval()
        try:
            x = torch.empty(1, 3, image_size, image_size, device="meta")
            on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
            with torch.no_grad(), _without_norms(features):
                out = torch.func.functional_call(features, on_meta, (x,))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{self.name} can't take images of {image_size} x {image_size}: change model.image_size "
                f"or model.cut ({_first_line(error)})"
            ) from error
        finally:
            for module in training:
                module.training = True
        out = out["map"] if isinstance(out, dict) else out
        if not isinstance(out, Tensor) or out.ndim != 4:
            raise UserError(f"model.cut {self.cut!r} of {self.name} has no feature map (channels, rows, columns)")
        return out.shape[1], out.shape[2], out.shape[3]


def _unchanged(x: Tensor) -> Tensor:
    return x


@contextmanager
def _without_norms(features: nn.Module) -> Iterator[None]:
    """BatchNorm changes no shape, and described only it would bring torch's compiler along (see `zoo`)."""
    norms = [module for module in features.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.forward = _unchanged  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def build_backbone(name: str, cut: str | None = None) -> Backbone:
    """The named network up to `cut`, with fresh weights.

    Raises UserError for an unknown name or cut, or a cut whose output is no map.
    """
    if name not in list_models(module=torchvision.models):
        raise UserError(_unknown("model.backbone", name, list_models(module=torchvision.models), BACKBONES))
    # VGG's classifier, which is cut off, would take seconds and 0.5 GB to make.
    device = "meta" if name.startswith("vgg") else torch.get_default_device()
    with torch.device(device):
        network = get_model(name, weights=None, **_arguments(name))
    features = _cut(network, name, cut or default_cut(name))
    if name.startswith("vgg"):
        _make_vgg(features)
    if name.startswith("densenet") and cut is None:
        # Torchvision applies it in its forward; the authors added it as a layer.
        features.add_module("relu", nn.ReLU(inplace=True))
    return Backbone(name, cut, features)


def default_cut(name: str) -> str:
    """The module whose output is the map when `model.cut` is left out."""
    for beginning, cut in _CUTS.items():
        if name.startswith(beginning):
            return cut
    raise UserError(f"no feature map is known for {name}: name the torchvision module to cut after in model.cut")


def _arguments(name: str) -> dict[str, Any]:
    if name.startswith(("googlenet", "inception")):
        # transform_input: torchvision's weights expect [-1, 1], our images are normalised like all others'.
        return {"init_weights": False, "aux_logits": False, "transform_input": True}
    return {}


def _make_vgg(features: nn.Module) -> None:
    """Memory for layers described only, and torchvision's initialisation of them."""
    features.to_empty(device=torch.get_default_device())
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def _cut(network: nn.Module, name: str, cut: str) -> nn.Module:
    """The network up to the module `cut`: its leading children if it runs them in order, else traced."""
    modules = [path for path, _ in network.named_modules() if path]
    if cut not in modules:
        raise UserError(f"{name}: " + _unknown("model.cut", cut, modules, [n for n, _ in network.named_children()]))
    leading = None if name.startswith(_BRANCHING) else _leading(network, cut.split("."))
    if leading is not None:
        return leading
    try:
        return create_feature_extractor(network, {cut: "map"})
    except Exception as error:
        raise UserError(f"model.cut {cut!r} of {name} can't be cut out: {_first_line(error)}") from error


def _leading(module: nn.Module, path: list[str]) -> nn.Sequential | None:
    """The children of `module` up to and including `path`, or None where they branch on the way."""
    head, *rest = path
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in module.named_children():
        kept[name] = child
        if name != head:
            continue
        if rest:
            inner = _leading(child, rest) if type(child).forward is nn.Sequential.forward else None
            if inner is None:
                return None
            kept[name] = inner
        break
    return nn.Sequential(kept)


def _unknown(setting: str, value: str, known: list[str], examples: tuple[str, ...] | list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected for example {', '.join(examples[:4])}"
    return f"{setting} {value!r} does not exist in torchvision; {hint}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
