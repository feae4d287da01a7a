"""Weights a backbone starts with: downloaded by name, or a file as people have it.

Files are `.safetensors`, or `.pth` read with `weights_only`: nothing that could run code is unpickled. Where in the
file the network lies, and what stands before its names, is found (`model_ema`, `module.encoder_q.`, anything):
the one place under which most names fit. Float16 is cast; the classifier and whatever else lies beyond the cut is
ignored.
"""

import argparse
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from protopnet.errors import UserError
from protopnet.model import timm_networks, torchvision_networks
from protopnet.model.backbones import Backbone, is_timm

# Averages over training come first where a file holds several copies of a network that fit equally well.
_AVERAGES = ("ema", "teacher")
# The names of the iNaturalist networks of BBN (Zhou et al. 2020): the last block exists twice, one for each branch.
_RENAMED = (
    (re.compile(r"(^|\.)cb_block\."), r"\1layer4.2."),
    # DenseNet files of old versions write `norm.1.weight` for `norm1.weight` inside dense layers.
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2."),
)


def load_weights(backbone: Backbone, spec: str | None) -> None:
    """Load `model.weights` into the backbone: `imagenet`, `pretrained`, a path or s3:// URI, or None for nothing.

    Raises UserError where the file can't be read, belongs to another architecture, or holds numbers that aren't finite.
    """
    if spec is None:
        return
    own = {name: tensor for name, tensor in backbone.features.state_dict().items() if not _counter(name)}
    given = _named(backbone, spec)
    state, prefix = under_best_prefix(given, own)
    misfit = _misfit(backbone, own, state)
    if misfit and is_timm(backbone.name):
        # Names of the network's authors, or positions of another size of image.
        for foreign in (state, *_containers(given)):
            converted = timm_networks.converted(backbone.features, foreign)
            if not _misfit(backbone, own, converted):
                state, misfit = converted, None
                break
    if misfit:
        raise UserError(
            f"model.weights {spec} are not weights of model.backbone {backbone.name}: {misfit}"
            f"{_how_well(own, state, prefix)}; "
            "name a file of this architecture, or the backbone that the file belongs to"
        )
    for name in own:
        if not state[name].isfinite().all():
            raise UserError(f"model.weights {spec}: {name} holds numbers that aren't finite; take another file")
    # Without its counters of batches, which are missing in files of old versions and of no consequence.
    backbone.features.load_state_dict({name: state[name] for name in own}, strict=False)


def read_state(uri: str) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or `.pth` file, with the names of what they lie in before their own."""
    from protopnet import storage

    try:
        data = storage.read_bytes(uri)
    except OSError as error:
        raise UserError(f"model.weights: can't read {uri}: {error.strerror or error}") from error
    try:
        if uri.endswith(".safetensors"):
            from safetensors.torch import load

            content: object = load(data)
        else:
            # A Namespace holds values and does nothing; torchvision's and timm's scripts save theirs beside the tensors.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's readers raise on what isn't a state dict
        raise UserError(
            f"model.weights: {uri} is no file of tensors (.safetensors, or .pth holding a plain state dict); "
            "whole pickled models are not loaded"
        ) from error
    state = dict(_tensors(content))
    if not state:
        raise UserError(f"model.weights: {uri} holds no state dict (names and tensors)")
    return state


def under_best_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under the one prefix whose names fit `own` best, without it; and the prefix.

    Best: most tensors of the right shape, then most of the right name, then averages over training, then the first.
    """
    state = {_modern_name(name): tensor for name, tensor in state.items()}
    shapes, names = Counter[str](), Counter[str]()
    for name, tensor in state.items():
        for prefix, rest in _splits(name):
            if rest in own:
                names[prefix] += 1
                shapes[prefix] += tensor.shape == own[rest].shape
    best = max(
        names or ("",), key=lambda prefix: (shapes[prefix], names[prefix], any(word in prefix for word in _AVERAGES))
    )
    return {name.removeprefix(best): tensor for name, tensor in state.items() if name.startswith(best)}, best


def _named(backbone: Backbone, spec: str) -> dict[str, Tensor]:
    """The tensors that `model.weights` names, wherever they come from."""
    if spec not in ("imagenet", "pretrained"):
        return read_state(spec)
    if is_timm(backbone.name) != (spec == "pretrained"):
        raise UserError(
            f"model.weights {spec}: expected `pretrained` for timm's networks and `imagenet` for torchvision's, "
            f"and model.backbone is {backbone.name}"
        )
    if spec == "imagenet":
        return torchvision_networks.download(backbone.name)
    return timm_networks.download(backbone.name, backbone.preprocessing.size)


def _tensors(content: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in mappings within mappings, by the way to it."""
    if isinstance(content, Tensor):
        yield ".".join(path), content
    elif isinstance(content, Mapping):
        for name, inside in content.items():
            yield from _tensors(inside, (*path, str(name)))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a name in two behind a dot, from nothing before it."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _containers(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors under each prefix that most of the file's have, without it."""
    prefixes = Counter(prefix for name in state for prefix, _ in _splits(name))
    for prefix, count in prefixes.most_common():
        if count > len(state) / 2:
            yield {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _modern_name(name: str) -> str:
    for old, new in _RENAMED:
        name = old.sub(new, name)
    return name


def _counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _misfit(backbone: Backbone, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """The first reason why these can't be the backbone's weights."""
    for name, tensor in own.items():
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != tensor.shape:
            return f"{name} has shape {_shape(state[name])}, expected {_shape(tensor)}"
    # Tensors that are neither beyond the cut nor of a classifier: ResNet-34's in a ResNet-18.
    tops = {name.split(".")[0] for name in own}
    for name in state:
        if name not in backbone.whole and name.split(".")[0] in tops and not _counter(name):
            return f"{name} is not part of it"
    return None


def _how_well(own: Mapping[str, Tensor], state: Mapping[str, Tensor], prefix: str) -> str:
    fit = sum(name in state and state[name].shape == tensor.shape for name, tensor in own.items())
    return f" ({fit} of its {len(own)} tensors fit{f' below {prefix!r}' if prefix else ''})"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
