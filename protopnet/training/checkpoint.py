"""What a joint stage needs to go on from where it was cut off: one file, whole or not there, of the last epoch.

Ray Train's own checkpoints are folders that its controller counts some seconds later; this is one file that its
writer has replaced when `save_checkpoint` returns, with and without a group of workers.
"""

from typing import Any

import torch

from protopnet import storage


def save_checkpoint(folder: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint in a folder. state: tensors, numbers and texts, nested."""
    with storage.open_writer(_file(folder)) as handle:
        torch.save(state, handle)


def load_checkpoint(folder: str, device: torch.device) -> dict[str, Any] | None:
    """The last checkpoint, its tensors on the device; None if there is none yet."""
    if not storage.exists(_file(folder)):
        return None
    with storage.open_reader(_file(folder)) as handle:
        return torch.load(handle, map_location=device, weights_only=True)  # type: ignore[no-any-return]


def _file(folder: str) -> str:
    return storage.join(folder, "state.pt")
