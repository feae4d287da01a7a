"""One step of SGD: what a training worker does with its part of a batch. Plain PyTorch, knows no Ray.

Legend: B images of this worker's part, K classes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from protopnet import imaging
from protopnet.config import TrainSettings
from protopnet.model.losses import Objective, baseline_loss, prototype_loss
from protopnet.model.network import Baseline, ProtoPNet
from protopnet.model.prototypes import true_float32

Precision = Literal["float32", "tf32", "bf16", "fp16"]


@dataclass
class Stepper:
    """Forward, backward and update, batch after batch.

    model: what is called: the network itself, or the wrapper that averages its gradients over the workers.
    """

    model: nn.Module
    network: ProtoPNet | Baseline
    optimiser: torch.optim.Optimizer
    objective: Objective
    train: TrainSettings

    def __post_init__(self) -> None:
        self.device = next(self.network.parameters()).device
        self.precision = chosen_precision(self.train, self.device)
        # Gradients of half precision vanish below 6e-8: the loss is scaled up, and they are scaled down again.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def __call__(self, batch: tuple[torch.Tensor, torch.Tensor], weight: float = 1.0) -> dict[str, torch.Tensor]:
        """A step with uint8 pixels and labels; returns the means of the loss terms and of the accuracy.

        weight: what this worker's gradients count for in the average over the workers, 1 where all have equally
        many images.
        """
        pixels_BHWC, labels_B = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        self.optimiser.zero_grad(set_to_none=True)
        means: dict[str, torch.Tensor] = {}
        pieces = list(zip(*(t.chunk(self.train.accumulate) for t in (pixels_BHWC, labels_B)), strict=True))
        for number, (pixels_bHWC, labels_b) in enumerate(pieces):
            share = len(labels_b) / len(labels_B)
            with self._averaging(last=number + 1 == len(pieces)), self._as_asked():
                terms = self._forward(pixels_bHWC, labels_b)
                self.scaler.scale(weight * share * terms["total"]).backward()
            for name, value in terms.items():
                means[name] = means.get(name, 0) + share * value.detach()
        self._update()
        return means

    def _forward(self, pixels_BHWC: torch.Tensor, labels_B: torch.Tensor) -> dict[str, torch.Tensor]:
        with autocast(self.precision, self.device):
            output = self.model(imaging.normalise(pixels_BHWC, self.network.preprocessing))
        if isinstance(self.network, Baseline):
            terms = baseline_loss(output, labels_B, self.objective)
        else:
            terms = prototype_loss(output, labels_B, self.network, self.objective)
        return terms | {"accuracy": (output.logits_BK.argmax(1) == labels_B).float().mean()}

    def _update(self) -> None:
        if self.train.clip is not None:
            self.scaler.unscale_(self.optimiser)
            stepped = [p for group in self.optimiser.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(stepped, self.train.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _averaging(self, last: bool) -> AbstractContextManager[None]:
        """Gradients of the pieces of a part add up first, and are averaged over the workers once."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _as_asked(self) -> AbstractContextManager[None]:
        """float32 is IEEE float32, forward and backward; PyTorch's own default lets cuDNN round to TF32."""
        if self.precision == "float32":
            return true_float32()
        return _tf32() if self.precision == "tf32" else nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    backends: Any = torch.backends
    flags = (backends.cuda.matmul, backends.cudnn.conv)
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def chosen_precision(train: TrainSettings, device: torch.device) -> Precision:
    """What `train.precision` means on this device: auto is bf16 where the hardware multiplies it itself, on older
    GPUs fp16, else float32."""
    if train.precision != "auto":
        return train.precision
    if has_fast_bf16(device):
        return "bf16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return "fp16"
    return "float32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Half precision for backbone and add-on layers, where it was chosen."""
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
    return nullcontext()


def mixed_precision(train: TrainSettings, device: torch.device) -> AbstractContextManager[None]:
    """`autocast` as these settings ask for it on this device."""
    return autocast(chosen_precision(train, device), device)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
