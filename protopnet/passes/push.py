"""The push: each prototype moves onto the nearest latent patch of its own class.

A Ray Data map-reduce over the un-augmented training images (`nearest_patches`). Candidates carry their patch with them, so
the reduce needs no second look at the images, but for near-ties; where all these patches would be too much to send, those
that were chosen are looked at again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet
from protopnet.passes.image_pass import PassOptions
from protopnet.passes.nearest_patches import SPARE_CANDIDATES, NearestTask, collect, settle, with_patches

# Candidates that the reduce keeps bring their patches along if these have no more numbers than this: 16 MB.
MOST_NUMBERS = 1 << 22


@dataclass(frozen=True)
class PushResult:
    """Where each prototype went: `chosen` has one CANDIDATE_SCHEMA row each; `refined` images were encoded again."""

    chosen: pa.Table
    refined: int

    @property
    def vectors_Pd(self) -> np.ndarray:
        return np.stack(self.chosen["vector"].to_numpy(zero_copy_only=False)).astype(np.float32)


def push(
    network: ProtoPNet,
    rows: pa.Table,
    *,
    distinct: bool,
    options: PassOptions,
    barred: Mapping[int, np.ndarray] | None = None,
    on_images: Callable[[int], None] = lambda images: None,
) -> PushResult:
    """Find the new place of every prototype among the training rows; the network is left as it is.

    `distinct`: no two prototypes of a class on the same patch; the earlier prototype chooses first.
    `barred`: by image_id, patches (rows x columns) that no prototype may take.
    """
    prototype_class_P = network.prototype_class.cpu().numpy()
    k = candidates_needed(prototype_class_P, distinct)
    vectors = network.prototypes.numel() * k <= MOST_NUMBERS
    task = NearestTask(network, k, spare=SPARE_CANDIDATES, barred=barred or {}, vectors=vectors)
    best = collect(rows, task, options, on_images)
    _check_all_found(best, len(prototype_class_P))
    best, refined = settle(network, rows, best, lambda found: pick(found, prototype_class_P, distinct), options=options)
    chosen = choose(best, prototype_class_P, distinct)
    return PushResult(chosen if vectors else with_patches(network, rows, chosen, options=options), refined)


def apply_push(network: ProtoPNet, result: PushResult) -> None:
    """Put the chosen patches into the prototypes."""
    with torch.no_grad():
        network.prototypes.copy_(torch.from_numpy(result.vectors_Pd).view_as(network.prototypes))


def candidates_needed(prototype_class_P: np.ndarray, distinct: bool) -> int:
    """How many candidates a prototype must keep: another of its class can take at most one patch each."""
    return int(np.bincount(prototype_class_P).max()) if distinct else 1


def _check_all_found(best: pa.Table, count: int) -> None:
    missing = np.setdiff1d(np.arange(count), best["prototype"].to_numpy())
    if len(missing):
        raise UserError(
            f"no patch can be found for prototype {missing[0]}: its class has no training image, or training has "
            "diverged (a network with numbers that aren't finite): lower the learning rates train.lr_*"
        )


def choose(best: pa.Table, prototype_class_P: np.ndarray, distinct: bool) -> pa.Table:
    """The candidate that each prototype moves to, in the order of the prototypes."""
    return best.take(pick(best, prototype_class_P, distinct))


def pick(best: pa.Table, prototype_class_P: np.ndarray, distinct: bool) -> list[int]:
    """Row of one candidate a prototype: its nearest, or its nearest that no earlier one of its class has taken.

    A class with fewer patches than prototypes shares them again once all are taken.
    """
    prototypes = best["prototype"].to_numpy()
    places = list(zip(best["image_id"].to_pylist(), best["row"].to_pylist(), best["column"].to_pylist(), strict=True))
    taken: set[tuple[int, ...]] = set()
    picks = []
    for p, label in enumerate(prototype_class_P.tolist()):
        own = range(*np.searchsorted(prototypes, [p, p + 1]))
        free = (i for i in own if (label, *places[i]) not in taken) if distinct else iter(own)
        picks.append(next(free, own[0]))
        taken.add((label, *places[picks[-1]]))
    return picks
