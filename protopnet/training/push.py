"""The push: each prototype moves onto the nearest latent patch of its own class.

A Ray Data map-reduce over the un-augmented training images. Candidates carry their patch with them, so the reduce
needs no second look at the images, but for near-ties: forward passes in batches of different sizes differ in the
last bits of a float, and where that could decide, the images are encoded again one at a time. That makes the choice
the same for any number of shards, workers and any batch size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet.errors import UserError
from protopnet.explain.nearest import CANDIDATE_SCHEMA, local_nearest, merge_nearest, rounding, vector_column
from protopnet.model.network import ProtoPNet, placed
from protopnet.model.prototypes import paired_distances
from protopnet.training.passes import PassOptions, run_pass

# Candidates as near as the last one needed, kept beside it: as many copies of an image there may be in a class.
SPARE_CANDIDATES = 64


@dataclass
class NearestTask:
    """`ImageTask`: the nearest patches of each prototype among the images of a batch."""

    network: ProtoPNet
    size: int
    k: int
    own_class: bool = True
    one_per_image: bool = False
    spare: int = 0

    def to(self, device: torch.device) -> "NearestTask":
        placed(self.network, device)
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        network = self.network
        return local_nearest(
            network.latent(images_B3HW),
            rows["image_id"].to_numpy(),
            rows["label"].to_numpy(),
            network.prototypes,
            network.kind,
            self.k,
            prototype_class_P=network.prototype_class.cpu().numpy() if self.own_class else None,
            one_per_image=self.one_per_image,
            spare=self.spare,
        )


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
    size: int,
    distinct: bool,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> PushResult:
    """Find the new place of every prototype among the training rows; the network is left as it is.

    `distinct`: no two prototypes of a class on the same patch; the earlier prototype chooses first.
    """
    prototype_class_P = network.prototype_class.cpu().numpy()
    k = candidates_needed(prototype_class_P, distinct)
    best = CANDIDATE_SCHEMA.empty_table()
    for images, candidates in run_pass(rows, NearestTask(network, size, k, spare=SPARE_CANDIDATES), options):
        best = merge_nearest([best, candidates], k, SPARE_CANDIDATES)
        on_images(images)
    _check_all_found(best, len(prototype_class_P))
    refined = np.empty(0, dtype=np.int64)
    # A choice that changes may change those after it, so once isn't always enough.
    while len(doubtful := np.setdiff1d(doubtful_images(best, pick(best, prototype_class_P, distinct)), refined)):
        best = _refine(network, rows, best, doubtful, size, options)
        refined = np.union1d(refined, doubtful)
    return PushResult(choose(best, prototype_class_P, distinct), len(refined))


def apply_push(network: ProtoPNet, result: PushResult) -> None:
    """Put the chosen patches into the prototypes."""
    with torch.no_grad():
        network.prototypes.copy_(torch.from_numpy(result.vectors_Pd).view_as(network.prototypes))


def candidates_needed(prototype_class_P: np.ndarray, distinct: bool) -> int:
    """How many candidates a prototype must keep: another of its class can take at most one patch each."""
    return int(np.bincount(prototype_class_P).max()) if distinct else 1


def doubtful_images(best: pa.Table, picks: Sequence[int]) -> np.ndarray:
    """Ids of the images between which rounding could decide; empty where every choice is clear.

    Only candidates up to the one picked matter, and those beyond that follow it closely.
    """
    prototype, distance = best["prototype"].to_numpy(), best["distance"].to_numpy()
    close = (prototype[1:] == prototype[:-1]) & (distance[1:] - distance[:-1] <= rounding(distance[:-1]))
    doubted = np.zeros(len(prototype), dtype=bool)
    for first, picked in zip(np.searchsorted(prototype, prototype[picks]), picks, strict=True):
        end = picked  # of the run of close candidates that the picked one is in
        while end < len(close) and close[end]:
            end += 1
        pairs = first + np.flatnonzero(close[first:end])
        doubted[pairs] = doubted[pairs + 1] = True
    return np.unique(best["image_id"].to_numpy()[doubted])


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


def _refine(
    network: ProtoPNet, rows: pa.Table, best: pa.Table, doubtful: np.ndarray, size: int, options: PassOptions
) -> pa.Table:
    """The candidates again, those on doubtful images from maps computed one image at a time, by one thread: the
    last bits of a map depend on the threads as well."""
    task = ExactTask(network, size, best.filter(_is_in(best["image_id"], doubtful)))
    single = replace(options, plan=replace(options.plan, threads=1), batch_size=1)
    images = rows.filter(_is_in(rows["image_id"], doubtful))
    exact = [output for _, output in run_pass(images, task, single)]
    clear = best.filter(pc.invert(_is_in(best["image_id"], doubtful)))
    return merge_nearest([clear, *exact], k=len(best))


@dataclass
class ExactTask:
    """`ImageTask` for single images: candidates already found, their distances and patches computed exactly."""

    network: ProtoPNet
    size: int
    candidates: pa.Table

    def to(self, device: torch.device) -> "ExactTask":
        placed(self.network, device)
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        latent_BDHW = self.network.latent(images_B3HW)
        return exact_candidates(self.candidates, rows["image_id"].to_pylist(), latent_BDHW, self.network)


def exact_candidates(
    candidates: pa.Table, image_ids: Iterable[int], latent_BDHW: torch.Tensor, network: ProtoPNet
) -> pa.Table:
    """The candidates on these images, measured in float64 on these latent maps; equal patches measure equal."""
    _, _, h, w = network.prototypes.shape
    tables = []
    for latent_DHW, image_id in zip(latent_BDHW, image_ids, strict=True):
        own = candidates.filter(pc.equal(candidates["image_id"], image_id))
        cells = zip(own["row"].to_pylist(), own["column"].to_pylist(), strict=True)
        patches_nDhw = torch.stack([latent_DHW[:, row : row + h, column : column + w] for row, column in cells])
        distance = paired_distances(patches_nDhw, network.prototypes[own["prototype"].to_pylist()], network.kind)
        own = own.set_column(1, "distance", pa.array(distance.cpu().numpy()))
        tables.append(own.set_column(6, "vector", vector_column(patches_nDhw.flatten(1))))
    return pa.concat_tables(tables)


def _is_in(column: pa.ChunkedArray, values: np.ndarray) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(values, column.type))
