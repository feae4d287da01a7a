"""A network's tensors between two stages: one safetensors file, never a pickle."""

import torch
from safetensors.torch import load, save

from protopnet import storage


def save_state(uri: str, state: dict[str, torch.Tensor]) -> None:
    """Write all tensors of a state dict; the file appears whole or not at all."""
    storage.write_bytes(uri, save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))


def load_state(uri: str) -> dict[str, torch.Tensor]:
    return load(storage.read_bytes(uri))
