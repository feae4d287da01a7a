"""What a session needs of the images: similarities to all prototypes, and latent maps, on the disk of this machine.

    cache.json          of which bundle and data; written last
    rows.parquet        a row an image, or an augmented copy of it: image_id, copy, label, split
    similarities.npy    float32, n x P
    latents.npy         float32, n x D x H x W: with them a prototype on another patch is measured without a pass

Test images are no part of it: nothing may be chosen by them.

Legend: n rows, P prototypes, D channels, H W cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet import storage
from protopnet.config import LastLayerSettings, ModelSettings
from protopnet.datasets.rows import Dataset
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import min_distances, similarity, true_float32
from protopnet.passes.candidates import local_nearest
from protopnet.passes.image_pass import PLAIN, NetworkTask, PassOptions, run_pass
from protopnet.passes.push import PushResult, candidates_needed, choose
from protopnet.tables import read_table, write_table
from protopnet.training.last_layer import with_copies

_CHUNK = 256  # latent maps read at a time


@dataclass
class CacheTask(NetworkTask):
    """`ImageTask`: latent maps and similarities, flat."""

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        latent_BDHW = self.network.latent(images_B3HW)
        similarities_BP = self.network(images_B3HW).similarities_BP
        table = rows.select(["image_id", "copy"])
        for name, values in (("latent", latent_BDHW), ("similarities", similarities_BP)):
            flat_BX = values.float().flatten(1).cpu().numpy()
            column = pa.FixedSizeListArray.from_arrays(pa.array(flat_BX.reshape(-1)), flat_BX.shape[1])
            table = table.append_column(name, column)
        return table


def write_cache(
    folder: Path,
    network: ProtoPNet,
    model: ModelSettings,
    dataset: Dataset,
    bundle: str,
    settings: LastLayerSettings,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> None:
    """One pass over the training and validation images. bundle: its hash."""
    table = dataset.table.filter(pc.not_equal(dataset.table["split"], "test"))
    rows = with_copies(table, settings.copies).sort_by([("image_id", "ascending"), ("copy", "ascending")])
    _, H, W = network.backbone.map_shape(model.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cache.json").unlink(missing_ok=True)
    shape = (len(rows), network.prototypes.shape[1], H, W)
    latents = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float32, shape)
    similarities = np.lib.format.open_memmap(
        folder / "similarities.npy", "w+", np.float32, (len(rows), len(network.prototypes))
    )
    places = {key: place for place, key in enumerate(_keys(rows))}
    for images, output in run_pass(rows, CacheTask(network), options):
        at = [places[key] for key in _keys(output)]
        latents[at] = _matrix(output["latent"]).reshape(-1, *shape[1:])
        similarities[at] = _matrix(output["similarities"])
        on_images(images)
    for array in (latents, similarities):
        array.flush()
    write_table(str(folder / "rows.parquet"), rows.select(["image_id", "copy", "label", "split"]))
    storage.write_json(str(folder / "cache.json"), _about(bundle, dataset, settings))


@dataclass(frozen=True)
class Cache:
    """What `write_cache` wrote; arrays stay on the disk until they are read."""

    rows: pa.Table
    similarities_nP: np.ndarray
    latents_nDHW: np.ndarray

    @classmethod
    def load(cls, folder: Path, bundle: str, dataset: Dataset, settings: LastLayerSettings) -> "Cache | None":
        """None where there is none, or one of another bundle or other data."""
        try:
            about = storage.read_json(str(folder / "cache.json"))
        except FileNotFoundError:
            return None
        if about != _about(bundle, dataset, settings):
            return None
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("similarities", "latents")]
        return cls(read_table(str(folder / "rows.parquet")), *arrays)

    def split(self, name: str, *, plain: bool) -> np.ndarray:
        """Which rows are of a split; plain: without augmented copies."""
        chosen = pc.equal(self.rows["split"], name)
        if plain:
            chosen = pc.and_(chosen, pc.equal(self.rows["copy"], PLAIN))
        return np.flatnonzero(chosen.to_numpy())

    @torch.no_grad()
    def similarities_to(self, network: ProtoPNet, prototypes_QDhw: torch.Tensor) -> np.ndarray:
        """Similarity of every row to prototypes that are none of the bundle's, from one look at all latent maps: n x Q."""
        found = []
        with true_float32():
            for start in range(0, len(self.latents_nDHW), _CHUNK):
                latents_BDHW = torch.from_numpy(self.latents_nDHW[start : start + _CHUNK].copy())
                distances_BQ, _ = min_distances(latents_BDHW, prototypes_QDhw, network.kind)
                found.append(similarity(distances_BQ, network.kind, network.epsilon).numpy())
        return np.concatenate(found)

    def push(
        self,
        network: ProtoPNet,
        rows: pa.Table,
        *,
        distinct: bool,
        options: PassOptions,
        barred: dict[int, np.ndarray] | None = None,
    ) -> PushResult:
        """As `passes.push.push`, from the latent maps; patches that rounding can't tell apart may be chosen otherwise."""
        wanted = pa.array(rows["image_id"].to_numpy())
        plain = pc.and_(pc.equal(self.rows["copy"], PLAIN), pc.is_in(self.rows["image_id"], value_set=wanted))
        at = np.flatnonzero(plain.to_numpy())
        class_P, image_ids = network.prototype_class.numpy(), self.rows["image_id"].to_numpy()[at]
        height, width = self.latents_nDHW.shape[2:]
        h, w = network.prototypes.shape[2:]
        free = np.zeros((height - h + 1, width - w + 1), dtype=bool)
        barred_BL = np.stack([(barred or {}).get(image, free).reshape(-1) for image in image_ids.tolist()])
        best = local_nearest(
            torch.from_numpy(self.latents_nDHW[at]),
            image_ids,
            self.rows["label"].to_numpy()[at],
            network.prototypes.detach(),
            network.kind,
            candidates_needed(class_P, distinct),
            prototype_class_P=class_P,
            barred_BL=barred_BL,
        )
        return PushResult(choose(best, class_P, distinct), 0)


def _about(bundle: str, dataset: Dataset, settings: LastLayerSettings) -> dict[str, Any]:
    return {
        "format": "protopnet-workbench",
        "version": 1,
        "bundle": bundle,
        "images": dataset.counts(),
        "copies": settings.copies,
    }


def _keys(rows: pa.Table) -> list[tuple[int, int]]:
    return list(zip(rows["image_id"].to_pylist(), rows["copy"].to_pylist(), strict=True))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    matrix: np.ndarray = lists.flatten().to_numpy().reshape(len(lists), -1)
    return matrix
