"""Import of state dicts saved by the authors' code.

Their names: `features.*` (torchvision's names, as in our `backbone.features.*`), `add_on_layers.*`,
`prototype_vectors`, `ones` (a constant of their distance), `last_layer.weight`. Read the file with
`weights.read_state`; whole pickled models have to be turned into a state dict where they were made.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet
from protopnet.model.weights import under_best_prefix

_THEIRS = {"backbone.features.": "features.", "add_on.": "add_on_layers."}
_IGNORED = ("ones",)


def sized_as_authors(model: ModelSettings, state_dict: Mapping[str, Tensor]) -> ModelSettings:
    """The settings with the number, depth and shape of the prototypes that the authors' state dict holds."""
    found = [tensor for name, tensor in state_dict.items() if name.split(".")[-1] == "prototype_vectors"]
    if not found or found[0].ndim != 4:
        raise UserError(
            f"model.weights {model.weights} is no state dict of the authors' code: it has no prototype_vectors; "
            "save theirs with torch.save(model.state_dict(), file)"
        )
    prototypes, depth, *shape = found[0].shape
    return model.model_copy(
        update={"prototypes": prototypes, "prototype_depth": depth, "prototype_shape": tuple(shape)}
    )


def import_authors_state(state_dict: Mapping[str, Tensor], network: ProtoPNet) -> None:
    """Load the tensors into a network of the same sizes, which then computes what theirs does.

    Their prototypes lie class by class, also after a push. Raises UserError on the first name or
    shape that doesn't fit.
    """
    own = network.state_dict()
    ours = {_their_name(name): name for name in own}
    found, _ = under_best_prefix(state_dict, {name: own[ours[name]] for name in ours})
    state = {ours.get(name, name): tensor for name, tensor in found.items() if name not in _IGNORED}
    for name, tensor in state.items():
        if name not in own:
            raise UserError(f"the authors' state dict has {name}, which this network lacks: check model.backbone")
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{name} of the authors' state dict has shape {tuple(tensor.shape)}, expected "
                f"{tuple(own[name].shape)}: check model.backbone, model.add_on, model.prototypes and "
                "model.prototype_depth"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{name} of the authors' state dict holds numbers that aren't finite: take another file")
    missing = [name for name in own if name not in state and not _may_be_missing(name)]
    if missing:
        raise UserError(f"the authors' state dict lacks {missing[0]}: check model.backbone and model.add_on")
    with torch.no_grad():
        network.load_state_dict(own | state)


def _their_name(name: str) -> str:
    if name == "prototypes":
        return "prototype_vectors"
    for ours, theirs in _THEIRS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _may_be_missing(name: str) -> bool:
    # Prototypes' classes aren't in their state dicts, batch counters not in those of old versions.
    return name == "prototype_class" or name.endswith("num_batches_tracked")
