"""Weights a backbone starts with: torchvision's own, or a file in torchvision's names.

Files are `.safetensors`, or `.pth` read with `weights_only`: nothing is ever unpickled. Float16 is
cast. The classifier and whatever else lies beyond the cut is ignored.
"""

import io
import re
from collections.abc import Iterator, Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from protopnet.errors import UserError
from protopnet.model.backbones import Backbone
from protopnet.model.zoo import get_model, get_model_weights

# What other programs put around the tensors or before their names.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "backbone.features.")


def load_weights(backbone: Backbone, spec: str | None) -> None:
    """Load `model.weights` into the backbone: `imagenet`, a path or s3:// URI, or None for nothing.

    Raises UserError where the file can't be read or belongs to another architecture.
    """
    if spec is None:
        return
    state = _download(backbone.name) if spec == "imagenet" else read_state(spec)
    state = {_modern_name(name): tensor for name, tensor in state.items()}
    wrong = _mismatch(backbone, state)
    if wrong:
        raise UserError(
            f"model.weights {spec} are not weights of model.backbone {backbone.name}: {wrong}; "
            "name a file of this architecture, or the backbone that the file belongs to"
        )
    own = backbone.features.state_dict()
    # Counters of batches are missing in files of old versions, and of no consequence.
    backbone.features.load_state_dict(own | {name: state[name] for name in own if name in state})


def read_state(uri: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `.pth` file, without the wrappers of other programs."""
    from protopnet import storage

    try:
        data = storage.read_bytes(uri)
    except OSError as error:
        raise UserError(f"model.weights: can't read {uri}: {error.strerror or error}") from error
    try:
        if uri.endswith(".safetensors"):
            state = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's readers raise on what isn't a state dict
        raise UserError(
            f"model.weights: {uri} is no file of tensors (.safetensors, or .pth holding a plain state dict); "
            "whole pickled models are not loaded"
        ) from error
    return _unwrapped(state, uri)


def _unwrapped(state: object, uri: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"model.weights: {uri} holds no state dict (names and tensors)")
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return dict(state)


def _download(name: str) -> dict[str, Tensor]:
    choices = get_model_weights(name)
    weights = choices["IMAGENET1K_V1"] if "IMAGENET1K_V1" in choices.__members__ else choices["DEFAULT"]
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights imagenet: can't download {weights.url}: {error}; give a file instead"
        ) from error


def _modern_name(name: str) -> str:
    """DenseNet files of old versions write `norm.1.weight` for `norm1.weight` inside dense layers."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", name)


def _mismatch(backbone: Backbone, state: Mapping[str, Tensor]) -> str | None:
    """The first reason why these can't be the backbone's weights."""
    own = backbone.features.state_dict()
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != tensor.shape:
            return f"{name} has shape {_shape(state[name])}, expected {_shape(tensor)}"
    extra = next(_foreign(backbone.name, own, state), None)
    return f"{extra} is not part of it" if extra else None


def _foreign(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that are neither beyond the cut nor of a classifier: ResNet-34's in a ResNet-18."""
    with torch.device("meta"):
        whole = get_model(name, weights=None).state_dict()
    tops = {key.split(".")[0] for key in own}
    return (key for key in state if key not in whole and key.split(".")[0] in tops)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
