"""What makes a trained network a result: the bundle with the story of each prototype, and its evaluation.

Both are passes. The first goes over the source images of the prototypes only; it encodes each again and refuses to
write a bundle whose prototypes aren't the patches they claim to be.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet import __version__, imaging, storage
from protopnet.config import RunSettings
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.explain.boxes import activation_boxes, receptive_field_boxes, scale_boxes
from protopnet.model.bundle import PROTOTYPE_SCHEMA, load_bundle, save_bundle
from protopnet.model.network import Baseline, ProtoPNet, placed
from protopnet.model.prototypes import distance_maps, paired_distances, similarity
from protopnet.model.receptive_field import receptive_field
from protopnet.predictor import Predictor
from protopnet.tables import write_table
from protopnet.training.metrics import classification_metrics
from protopnet.training.passes import PassOptions, run_pass

THUMBNAIL_SIDE = 256
# "Each prototype equals a patch of a training image": squared distance after encoding that image again.
REENCODE_TOLERANCE = 1e-5


@dataclass
class DescribeTask:
    """`ImageTask`: rows of `prototypes.parquet` for the prototypes that come from the images of a batch."""

    network: ProtoPNet
    size: int
    places: pa.Table  # prototype, image_id, row, column
    classes: list[str]

    def to(self, device: torch.device) -> "DescribeTask":
        placed(self.network, device)
        self.reader = ImageReader()
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        latent_BDHW = self.network.latent(images_B3HW)
        encoded = self.reader.read(rows, np.arange(len(rows)))
        tables = [
            self._describe(latent_DHW[None], row, data)
            for latent_DHW, row, data in zip(latent_BDHW, rows.to_pylist(), encoded, strict=True)
        ]
        return pa.concat_tables(tables)

    def _describe(self, latent_1DHW: torch.Tensor, image: dict[str, Any], encoded: bytes) -> pa.Table:
        network, size = self.network, self.size
        own = self.places.filter(pc.equal(self.places["image_id"], image["image_id"]))
        indices, cells = (
            own["prototype"].to_pylist(),
            list(zip(own["row"].to_pylist(), own["column"].to_pylist(), strict=True)),
        )
        prototypes_pDhw = network.prototypes[indices]
        self._check_patches(latent_1DHW, indices, prototypes_pDhw, cells, image["uri"])
        distances_pHW = distance_maps(latent_1DHW, prototypes_pDhw, network.kind)[0]
        maps_pHW = similarity(distances_pHW, network.kind, network.epsilon).cpu()
        seen = receptive_field(network.backbone, size)
        fields = receptive_field_boxes(cells, seen, size, (prototypes_pDhw.shape[2], prototypes_pDhw.shape[3]))
        shape = (size, image["width"], image["height"])
        labels = network.prototype_class[indices].tolist()
        columns = {
            "prototype": indices,
            "class": labels,
            "class_name": [self.classes[label] for label in labels],
            **{name: [image[name]] * len(indices) for name in ("image_id", "uri", "sha256")},
            "row": [row for row, _ in cells],
            "column": [column for _, column in cells],
            "box": scale_boxes(activation_boxes(maps_pHW, size), *shape).tolist(),
            "receptive_field": scale_boxes(fields, *shape).tolist(),
            "self_similarity": [float(m[cell]) for m, cell in zip(maps_pHW, cells, strict=True)],
            "activation_map": maps_pHW.tolist(),
            "thumbnail": [thumbnail(encoded)] * len(indices),
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


def thumbnail(encoded: bytes) -> bytes:
    """A small JPEG of an encoded image, its aspect ratio kept."""
    image = imaging.decode(encoded, at_least=THUMBNAIL_SIDE)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=88)
    return sink.getvalue()


def write_bundle(
    uri: str,
    network: ProtoPNet | Baseline,
    settings: RunSettings,
    dataset: Dataset,
    pushed: pa.Table | None,
    options: PassOptions,
) -> str:
    """Write the bundle and return its hash. `pushed`: where each prototype comes from (not for a baseline)."""
    prototypes = None
    if isinstance(network, ProtoPNet) and pushed is not None:
        places = pushed.select(["prototype", "image_id", "row", "column"])
        rows = dataset.split("train")
        rows = rows.filter(pc.is_in(rows["image_id"], value_set=pc.unique(places["image_id"])))
        task = DescribeTask(network, settings.model.image_size, places, dataset.classes)
        prototypes = pa.concat_tables([output for _, output in run_pass(rows, task, options)]).sort_by("prototype")
    provenance = {
        "run": settings.name,
        "protopnet": __version__,
        "torch": torch.__version__,
        "settings": settings.model_dump(mode="json"),
        "data": dataset.source,
        "images": dataset.counts(),
    }
    return save_bundle(uri, network, settings.model, dataset.classes, provenance, prototypes)


@dataclass
class ScoreTask:
    """`ImageTask`: the logits of bundles."""

    predictor: Predictor

    @property
    def size(self) -> int:
        return self.predictor.size

    def to(self, device: torch.device) -> "ScoreTask":
        self.predictor.to(device)
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        logits_BK = self.predictor.scores(images_B3HW).logits_BK.cpu().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(logits_BK.reshape(-1), pa.float32()), logits_BK.shape[1])
        return rows.select(["image_id", "uri", "label"]).append_column("logits", column)


def evaluate_bundle(
    bundle_uri: str,
    rows: pa.Table,
    output_uri: str,
    *,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Score manifest rows (whose labels are the bundle's) with a bundle loaded from storage.

    Writes `metrics.json` and `predictions.parquet` under `output_uri`; returns the metrics.
    """
    predictor = Predictor([load_bundle(bundle_uri)])
    outputs = []
    for images, output in run_pass(rows, ScoreTask(predictor), options):
        outputs.append(output)
        on_images(images)
    table = pa.concat_tables(outputs).sort_by("image_id").combine_chunks()
    logits_nK = table["logits"].chunk(0).flatten().to_numpy().reshape(len(table), -1)
    metrics = classification_metrics(logits_nK, table["label"].to_numpy(), predictor.classes)
    write_table(storage.join(output_uri, "predictions.parquet"), predictions(table, logits_nK, predictor.classes))
    storage.write_bytes(storage.join(output_uri, "metrics.json"), (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics


def predictions(table: pa.Table, logits_nK: np.ndarray, classes: list[str]) -> pa.Table:
    """A row an image: what it is, what it was taken for, and how sure."""
    predicted_n = logits_nK.argmax(1)
    shifted_nK = np.exp(logits_nK - logits_nK.max(1, keepdims=True))
    names = pa.array(classes)
    return (
        table.append_column("class_name", names.take(table["label"]))
        .append_column("prediction", pa.array(predicted_n, pa.int32()))
        .append_column("predicted_name", names.take(pa.array(predicted_n)))
        .append_column("probability", pa.array((1 / shifted_nK.sum(1)).astype(np.float32)))
    )
