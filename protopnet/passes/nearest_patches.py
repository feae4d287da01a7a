"""Nearest patches over a data set: the map-reduce of `passes/candidates.py` as Ray Data passes.

The push, pruning and the audit look for patches in this way. What rounding could decide is encoded again, one image at
a time by one thread: forward passes in batches of different sizes differ in the last bits of a float. So the result is
the same for any number of shards, workers and any batch size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import paired_distances, patches
from protopnet.passes.candidates import (
    Cutoff,
    Reducer,
    first_of_each_image,
    local_nearest,
    merge_nearest,
    rank_of_image,
    rounding,
    vector_column,
    without_vectors,
)
from protopnet.passes.image_pass import NetworkTask, PassOptions, run_pass

# Candidates as near as the last one needed, kept beside it: as many copies of an image there may be.
SPARE_CANDIDATES = 64


@dataclass
class NearestTask(NetworkTask):
    """`ImageTask`: the nearest patches of each prototype among the images of a batch.

    barred: by image_id, patches (rows x columns) that no prototype may take. vectors: whether candidates bring their
    patches along. A task remembers how near those were that it has found so far, and leaves out what is farther.
    """

    k: int
    own_class: bool = True
    one_per_image: bool = False
    spare: int = 0
    barred: Mapping[int, np.ndarray] = field(default_factory=dict)
    vectors: bool = True

    def to(self, device: torch.device) -> Self:
        self.cutoff = Cutoff(len(self.network.prototypes), self.k)  # not before: what Ray sends can't be written to
        return super().to(device)

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        network = self.network
        found = local_nearest(
            network.latent(images_B3HW),
            rows["image_id"].to_numpy(),
            rows["label"].to_numpy(),
            network.prototypes,
            network.kind,
            self.k,
            prototype_class_P=network.prototype_class.cpu().numpy() if self.own_class else None,
            one_per_image=self.one_per_image,
            spare=self.spare,
            barred_BL=self._barred(rows["image_id"].to_pylist()),
            vectors=self.vectors,
        )
        return self.cutoff.passing(found, one_per_image=self.one_per_image)

    def _barred(self, image_ids: Sequence[int]) -> np.ndarray | None:
        here = [self.barred.get(image_id) for image_id in image_ids]
        shape = next((mask.shape for mask in here if mask is not None), None)
        if shape is None:
            return None
        masks = [np.zeros(shape, dtype=bool) if mask is None else mask for mask in here]
        return np.stack(masks).reshape(len(masks), -1)


def nearest_patches(
    network: ProtoPNet,
    rows: pa.Table,
    *,
    k: int,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> pa.Table:
    """The k nearest patches of each prototype in manifest rows: images of any class, at most one patch an image.

    CANDIDATE_SCHEMA rows sorted by prototype and rank, k a prototype (all images where there are fewer), without their
    patches; `label` is the class of the image. Of equally near patches the earliest image, row and column come first.
    """
    task = NearestTask(network, k, own_class=False, one_per_image=True, spare=SPARE_CANDIDATES, vectors=False)
    best = collect(rows, task, options, on_images)
    best, _ = settle(network, rows, best, lambda found: _last_of_each(found, k), options=options, one_per_image=True)
    return without_vectors(merge_nearest([first_of_each_image(best)], k))


def collect(
    rows: pa.Table,
    task: NearestTask,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> pa.Table:
    """Map and reduce: the candidates of the task over all rows, before any closer look."""
    best = Reducer(task.k, task.spare, one_per_image=task.one_per_image)
    for images, candidates in run_pass(rows, task, options):
        best.add(candidates)
        on_images(images)
    return best.result()


def settle(
    network: ProtoPNet,
    rows: pa.Table,
    best: pa.Table,
    pick: Callable[[pa.Table], Sequence[int]],
    *,
    options: PassOptions,
    one_per_image: bool = False,
) -> tuple[pa.Table, int]:
    """The candidates with everything that rounding could decide decided, and how many images were encoded again.

    `pick`: for each prototype the last row that matters.
    """
    refined = np.empty(0, dtype=np.int64)
    # A choice that changes may change those after it, so once isn't always enough.
    while len(doubtful := np.setdiff1d(doubtful_images(best, pick(best)), refined)):
        best = _refine(network, rows, best, doubtful, options, one_per_image)
        refined = np.union1d(refined, doubtful)
    return best, len(refined)


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


def _last_of_each(best: pa.Table, k: int) -> list[int]:
    """For each prototype the last row of its k best images."""
    wanted = np.flatnonzero(rank_of_image(best) < k)
    prototype = best["prototype"].to_numpy()[wanted]
    ends = np.searchsorted(prototype, np.unique(prototype), side="right") - 1
    last: list[int] = wanted[ends].tolist()
    return last


def _refine(
    network: ProtoPNet,
    rows: pa.Table,
    best: pa.Table,
    doubtful: np.ndarray,
    options: PassOptions,
    one_per_image: bool,
) -> pa.Table:
    """The candidates again, those on doubtful images from maps computed one image at a time, by one thread: the
    last bits of a map depend on the threads as well."""
    task = ExactTask(network, best.filter(_is_in(best["image_id"], doubtful)), one_per_image)
    single = replace(options, plan=replace(options.plan, threads=1), batch_size=1)
    images = rows.filter(_is_in(rows["image_id"], doubtful))
    exact = [output for _, output in run_pass(images, task, single)]
    clear = best.filter(pc.invert(_is_in(best["image_id"], doubtful)))
    return merge_nearest([clear, *exact], k=len(best))


@dataclass
class ExactTask(NetworkTask):
    """`ImageTask` for single images: candidates already found, their distances and patches computed exactly."""

    candidates: pa.Table
    one_per_image: bool = False

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        latent_BDHW = self.network.latent(images_B3HW)
        measure = exact_best_patches if self.one_per_image else exact_candidates
        return measure(self.candidates, rows["image_id"].to_pylist(), latent_BDHW, self.network)


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


def exact_best_patches(
    candidates: pa.Table, image_ids: Iterable[int], latent_BDHW: torch.Tensor, network: ProtoPNet
) -> pa.Table:
    """For each prototype that has candidates on one of these images the image's best patch, measured in the same way;
    of equal ones the first."""
    _, _, h, w = network.prototypes.shape
    patches_BLQ = patches(latent_BDHW, h, w)
    columns = latent_BDHW.shape[3] - w + 1
    tables = []
    for patches_LQ, image_id in zip(patches_BLQ, image_ids, strict=True):
        own = first_of_each_image(candidates.filter(pc.equal(candidates["image_id"], image_id)))
        best = []
        for prototype_Q in network.prototypes[own["prototype"].to_pylist()].flatten(1):
            best.append(int(paired_distances(patches_LQ, prototype_Q[None], network.kind).cpu().numpy().argmin()))
        places = {"row": [patch // columns for patch in best], "column": [patch % columns for patch in best]}
        for name, values in places.items():
            own = own.set_column(own.schema.get_field_index(name), name, pa.array(values, pa.int32()))
        tables.append(own)
    return exact_candidates(pa.concat_tables(tables), image_ids, latent_BDHW, network)


def with_patches(network: ProtoPNet, rows: pa.Table, chosen: pa.Table, *, options: PassOptions) -> pa.Table:
    """Candidates with their patches, from another look at their images; in the same order."""
    images = rows.filter(_is_in(rows["image_id"], pc.unique(chosen["image_id"]).to_numpy()))
    numbered = chosen.append_column("place", pa.array(np.arange(len(chosen))))
    found = pa.concat_tables([table for _, table in run_pass(images, ExactTask(network, numbered), options)])
    return found.sort_by("place").drop_columns("place")


def _is_in(column: pa.ChunkedArray, values: np.ndarray) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(values, column.type))
