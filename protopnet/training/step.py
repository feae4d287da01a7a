"""One step of SGD: what a training worker does with a batch. Plain PyTorch, knows no Ray.

Legend: B images of this worker's batch, K classes.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from protopnet import imaging
from protopnet.config import TrainSettings
from protopnet.model.losses import baseline_loss, prototype_loss
from protopnet.model.network import Baseline, ProtoPNet


def train_step(
    model: nn.Module,
    network: ProtoPNet | Baseline,
    optimiser: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    train: TrainSettings,
    weight: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Forward, backward and update with a batch of uint8 pixels and labels; returns the loss terms and the accuracy.

    `model` is what is called: the network itself, or the wrapper that averages its gradients over the workers.
    `weight`: what this worker's gradients count for in that average, 1 where all have equally many images.
    """
    device = next(network.parameters()).device
    pixels_BHWC, labels_B = (tensor.to(device, non_blocking=True) for tensor in batch)
    with mixed_precision(train, device):
        output = model(imaging.normalise(pixels_BHWC))
    if isinstance(network, Baseline):
        terms = baseline_loss(output, labels_B, train)
    else:
        terms = prototype_loss(output, labels_B, network, train)
    optimiser.zero_grad(set_to_none=True)
    (weight * terms["total"]).backward()
    optimiser.step()
    terms["accuracy"] = (output.logits_BK.argmax(1) == labels_B).float().mean()
    return terms


def mixed_precision(train: TrainSettings, device: torch.device) -> AbstractContextManager[None]:
    """bf16 for backbone and add-on layers where the hardware multiplies bf16 itself; else nothing."""
    if train.precision == "bf16" or (train.precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
