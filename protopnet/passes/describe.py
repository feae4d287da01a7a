"""What prototypes and other patches look like: their boxes, how active the prototype is around them, a small picture.

A pass over the images that the patches are on. It encodes each again; prototypes that aren't the patches they claim to be
are an error.
"""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet import imaging
from protopnet.config import IntensitySettings
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.model.boxes import activation_boxes, receptive_field_boxes, scale_boxes
from protopnet.model.bundle import PROTOTYPE_SCHEMA
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import distance_maps, paired_distances, similarity
from protopnet.model.receptive_field import ReceptiveField, receptive_field
from protopnet.passes.image_pass import NetworkTask, PassOptions, run_pass

THUMBNAIL_SIDE = 256
# "Each prototype equals a patch of a training image": squared distance after encoding that image again.
REENCODE_TOLERANCE = 1e-5


@dataclass
class DescribeTask(NetworkTask):
    """`ImageTask`: rows of `prototypes.parquet` for patches of the images of a batch.

    places: prototype, image_id, row and column of each patch. `sources`: the patches are those that the prototypes come
    from, which is checked; else any patches, `self_similarity` is that of the patch, and an image has its thumbnail
    in one row only.
    """

    places: pa.Table
    classes: list[str]
    sources: bool = True
    max_pixels: int = imaging.MAX_PIXELS

    def to(self, device: torch.device) -> Self:
        self.reader = ImageReader()
        return super().to(device)

    @cached_property
    def field(self) -> ReceptiveField:
        return receptive_field(self.network.backbone, self.preprocessing.size, self.network.pool)

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        latent_BDHW = self.network.latent(images_B3HW)
        encoded = self.reader.read(rows, np.arange(len(rows)))
        tables = [
            self._describe(latent_DHW[None], row, data)
            for latent_DHW, row, data in zip(latent_BDHW, rows.to_pylist(), encoded, strict=True)
        ]
        return pa.concat_tables(tables)

    def _describe(self, latent_1DHW: torch.Tensor, image: dict[str, Any], encoded: bytes) -> pa.Table:
        network, size = self.network, self.preprocessing.size
        own = self.places.filter(pc.equal(self.places["image_id"], image["image_id"]))
        indices, cells = (
            own["prototype"].to_pylist(),
            list(zip(own["row"].to_pylist(), own["column"].to_pylist(), strict=True)),
        )
        prototypes_pDhw = network.prototypes[indices]
        if self.sources:
            self._check_patches(latent_1DHW, indices, prototypes_pDhw, cells, image["uri"])
        distances_pHW = distance_maps(latent_1DHW, prototypes_pDhw, network.kind)[0]
        maps_pHW = similarity(distances_pHW, network.kind, network.epsilon).cpu()
        fields = receptive_field_boxes(cells, self.field, size, (prototypes_pDhw.shape[2], prototypes_pDhw.shape[3]))
        shape = (size, image["width"], image["height"])
        small = thumbnail(encoded, self.max_pixels, self.preprocessing.intensity)
        labels = network.prototype_class[indices].tolist()
        columns = {
            "prototype": indices,
            "class": labels,
            "class_name": [self.classes[label] for label in labels],
            **{name: [image[name]] * len(indices) for name in ("image_id", "uri", "sha256", "width", "height")},
            "row": [row for row, _ in cells],
            "column": [column for _, column in cells],
            "box": scale_boxes(activation_boxes(maps_pHW, size), *shape).tolist(),
            "receptive_field": scale_boxes(fields, *shape).tolist(),
            "self_similarity": [float(m[cell]) for m, cell in zip(maps_pHW, cells, strict=True)],
            "activation_map": maps_pHW.tolist(),
            "thumbnail": [small] * len(indices) if self.sources else [small] + [None] * (len(indices) - 1),
            "name": [None] * len(indices),
            "group": [None] * len(indices),
        }
        return pa.table(columns, schema=PROTOTYPE_SCHEMA)

    def _check_patches(
        self,
        latent_1DHW: torch.Tensor,
        indices: list[int],
        prototypes_pDhw: torch.Tensor,
        cells: list[tuple[int, int]],
        uri: str,
    ) -> None:
        h, w = prototypes_pDhw.shape[2:]
        patches_pDhw = torch.stack([latent_1DHW[0, :, row : row + h, column : column + w] for row, column in cells])
        for index, distance in zip(indices, paired_distances(patches_pDhw, prototypes_pDhw, "linear"), strict=True):
            if float(distance) >= REENCODE_TOLERANCE:
                raise RuntimeError(
                    f"prototype {index} is {float(distance):.2e} away from the patch of {uri} it was pushed to"
                )


def thumbnail(
    encoded: bytes,
    max_pixels: int = imaging.MAX_PIXELS,
    intensity: IntensitySettings = imaging.AS_THE_FILE_SAYS,
) -> bytes:
    """A small JPEG of an encoded image, its aspect ratio kept."""
    image = imaging.decode(encoded, max_pixels=max_pixels, at_least=THUMBNAIL_SIDE, intensity=intensity)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=88)
    return sink.getvalue()


def describe_prototypes(network: ProtoPNet, dataset: Dataset, places: pa.Table, *, options: PassOptions) -> pa.Table:
    """The rows of `prototypes.parquet`. places: image_id, row and column of the patch that each prototype is.

    Raises RuntimeError for a prototype that isn't that patch.
    """
    rows = dataset.split("train")
    rows = rows.filter(pc.is_in(rows["image_id"], value_set=pc.unique(places["image_id"])))
    task = DescribeTask(network, places, dataset.classes, max_pixels=options.max_pixels)
    return pa.concat_tables([output for _, output in run_pass(rows, task, options)]).sort_by("prototype")
