"""torchvision's classification networks, cut where their feature map comes out.

The 17 networks of the ProtoPNet paper are cut where its authors cut them (VGG after its last
pooling, ResNet after `layer4`, DenseNet after its last norm and a ReLU); any other by name.

torchvision is imported where a network is made: a second or two that a wrong setting or `--help` shouldn't wait for.
"""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from protopnet.errors import UserError
from protopnet.model.cutting import cut_after, unknown

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


def build(name: str, cut: str | None) -> tuple[nn.Module, list[str]]:
    """The network up to `cut` with fresh weights, and the names of the tensors of all of it.

    Raises UserError for an unknown name or cut.
    """
    torchvision = imported()
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"{unknown('model.backbone', name, known, BACKBONES)}; timm's networks are written timm/NAME")
    # VGG's classifier, which is cut off, would take seconds and 0.5 GB to make.
    device = "meta" if name.startswith("vgg") else torch.get_default_device()
    with torch.device(device):
        network = torchvision.models.get_model(name, weights=None, **_arguments(name))
    whole = list(network.state_dict())
    features = cut_after(network, name, cut or _default_cut(name), trace=name.startswith(_BRANCHING))
    if name.startswith("vgg"):
        _make_vgg(features)
    if name.startswith("densenet") and cut is None:
        # torchvision applies it in its forward; the authors added it as a layer.
        features.add_module("relu", nn.ReLU(inplace=True))
    return features, whole


def download(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of the whole network, from its server or its cache."""
    choices = imported().models.get_model_weights(name)
    weights = choices["IMAGENET1K_V1"] if "IMAGENET1K_V1" in choices.__members__ else choices["DEFAULT"]
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights imagenet: can't download {weights.url}: {error}; give a file instead"
        ) from error


def _default_cut(name: str) -> str:
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


def imported() -> ModuleType:
    """torchvision, without torch's compiler unless that is there already."""
    # Its `ops` take one function, for RoI pooling, from the compiler: 1 to 3 s of the CPU time that every job, actor and
    # replica would take to start. So while it is imported, that function stands in for the compiler.
    stand_ins = {name: ModuleType(name) for name in ("torch._dynamo", "torch._dynamo.utils")}
    if stand_ins.keys().isdisjoint(sys.modules):
        vars(stand_ins["torch._dynamo.utils"])["is_compile_supported"] = _is_compile_supported
        sys.modules.update(stand_ins)
    try:
        import torchvision
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
    return torchvision


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))
