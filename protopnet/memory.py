"""How much memory a network takes in training and in passes, from its shapes alone.

Activations are what autograd would keep for the backward pass, seen in a forward pass on meta tensors. Not in it: the
allocator's fragments, cuDNN's workspaces, CUDA's own.

Shapes: B images of one worker's batch, D latent channels, L patches of an image, P prototypes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protopnet.config import RunSettings
from protopnet.model.network import Baseline, ProtoPNet
from protopnet.model.prototypes import buffer_bytes

_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes, by what takes them."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    prototypes: int

    @property
    def parts(self) -> list[tuple[str, int]]:
        return [(name, size) for name, size in vars(self).items() if size]

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def training_memory(network: ProtoPNet | Baseline, settings: RunSettings, batch: int, *, bf16: bool = False) -> Memory:
    """A worker that trains all but the last layer on `batch` images a step. bf16: as autocast keeps activations."""
    trained = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("last_layer"))
    kept = _kept(network, settings.model.image_size, batch, torch.bfloat16 if bf16 else torch.float32)
    return Memory(
        weights=_bytes(network),
        gradients=_FLOAT32 * trained,
        optimiser=2 * _FLOAT32 * trained,
        activations=kept,
        prototypes=_prototypes(network, settings.model.image_size, batch, training=True),
    )


def pass_memory(network: ProtoPNet | Baseline, image_size: int, batch: int) -> Memory:
    """An actor of a pass: the network, and the largest output of a layer with its input."""
    return Memory(
        weights=_bytes(network),
        gradients=0,
        optimiser=0,
        activations=_largest(network, image_size, batch),
        prototypes=_prototypes(network, image_size, batch, training=False),
    )


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _convolutions(network: ProtoPNet | Baseline) -> nn.Sequential:
    """What of the network works on maps, as it is (not a copy)."""
    return nn.Sequential(network.backbone, network.add_on if isinstance(network, ProtoPNet) else nn.Identity())


def _forward(network: ProtoPNet | Baseline, size: int, batch: int, dtype: torch.dtype) -> Tensor:
    """The convolutions' output on meta tensors; nothing of the network changes."""
    convolutions = _convolutions(network)

    def on_meta(tensor: Tensor) -> Tensor:
        learnt = tensor.requires_grad
        moved = torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else None)
        return moved.requires_grad_(learnt)

    tensors = {**dict(convolutions.named_parameters()), **dict(convolutions.named_buffers())}
    x_B3HW = torch.empty(batch, 3, size, size, device="meta", dtype=dtype)
    described = {name: on_meta(tensor) for name, tensor in tensors.items()}
    output: Tensor = torch.func.functional_call(convolutions, described, (x_B3HW,))
    return output


def _kept(network: ProtoPNet | Baseline, size: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a forward pass in training mode, each storage once, without the weights."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    modes = {module: module.training for module in network.modules()}
    learnt = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        network.train().requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = _forward(network, size, batch, dtype)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in learnt.items():
            parameter.requires_grad_(flag)
    del output
    return sum(storage.nbytes() for storage in storages.values())


def _largest(network: ProtoPNet | Baseline, size: int, batch: int) -> int:
    """Bytes of the largest input and output of a layer, which are there at the same time."""
    most = 0

    def look(module: nn.Module, given: tuple[object, ...], output: object) -> None:
        nonlocal most
        tensors = [tensor for tensor in (*given, output) if isinstance(tensor, Tensor)]
        most = max(most, sum(tensor.nbytes for tensor in tensors))

    leaves = [module for module in network.modules() if not list(module.children())]
    handles = [module.register_forward_hook(look) for module in leaves]
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        with torch.no_grad():
            _forward(network, size, batch, torch.float32)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return most


def _prototypes(network: ProtoPNet | Baseline, image_size: int, batch: int, *, training: bool) -> int:
    """Distances of B images to P prototypes: the chunk they are computed in, and what is kept of each pair."""
    if isinstance(network, Baseline):
        return 0
    P, D, h, w = network.prototypes.shape
    _, rows, columns = network.backbone.map_shape(image_size)
    patches = batch * (rows - h + 1) * (columns - w + 1)
    pairs = batch * P * (3 * _FLOAT32 + 8)  # distance, similarity, gradient; which patch
    return buffer_bytes(patches, P) + pairs + (patches * D * h * w * _FLOAT32 if training else 0)
