"""Import of state dicts saved by the authors' code.

Their names: `features.*` (torchvision's names, as in our `backbone.features.*`), `add_on_layers.*`,
`prototype_vectors`, `ones` (a constant of their distance), `last_layer.weight`. Read the file with
`weights.read_state`; whole pickled models have to be turned into a state dict where they were made.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet

_PREFIXES = {"features.": "backbone.features.", "add_on_layers.": "add_on."}
_NAMES = {"prototype_vectors": "prototypes", "last_layer.weight": "last_layer.weight"}
_IGNORED = ("ones",)


def import_authors_state(state_dict: Mapping[str, Tensor], network: ProtoPNet) -> None:
    """Load the tensors into a network of the same sizes, which then computes what theirs does.

    Their prototypes lie class by class, also after a push. Raises UserError on the first name or
    shape that doesn't fit.
    """
    state = {_our_name(name): tensor for name, tensor in state_dict.items() if _plain(name) not in _IGNORED}
    own = network.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise UserError(f"the authors' state dict has {name}, which this network lacks: check model.backbone")
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{name} of the authors' state dict has shape {tuple(tensor.shape)}, expected "
                f"{tuple(own[name].shape)}: check model.backbone, model.add_on, model.prototypes and "
                "model.prototype_depth"
            )
    missing = [name for name in own if name not in state and not _may_be_missing(name)]
    if missing:
        raise UserError(f"the authors' state dict lacks {missing[0]}: check model.backbone and model.add_on")
    with torch.no_grad():
        network.load_state_dict(own | state)


def _plain(name: str) -> str:
    return name.removeprefix("module.")  # DataParallel's


def _our_name(name: str) -> str:
    name = _plain(name)
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return _NAMES.get(name, name)


def _may_be_missing(name: str) -> bool:
    # Prototypes' classes aren't in their state dicts, batch counters not in those of old versions.
    return name == "prototype_class" or name.endswith("num_batches_tracked")
